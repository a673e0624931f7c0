"""Figures of campaigns: tables in, ``matplotlib.figure.Figure`` out, never pyplot's state.

    from experiments.analysis import load_runs
    from experiments.figures import rates_by_bit, save

    save(rates_by_bit(load_runs("results/default")), "out/rates_by_bit")     # .svg and .png

    python -m experiments.figures results/default                            # all of them, with their captions

Numbers come from ``experiments.analysis``; only quantiles and histograms are taken here, so that a million runs become
as few marks as a thousand. Every figure has a caption with its n, and says why it is not drawn where its data are
missing (``NoDataError``). Values that are NaN or infinite are drawn as what they are.
"""

import lazy_loader

# What is handed on, and from where, stands in the stub beside; nothing is loaded before it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
