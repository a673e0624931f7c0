"""Figures of campaigns: tables in, ``matplotlib.figure.Figure`` out, never pyplot's state.

    from experiments.analysis import load_runs
    from experiments.figures import rates_by_bit, save

    save(rates_by_bit(load_runs("results/default")), "out/rates_by_bit")     # .svg and .png

    python -m experiments.figures results/default                            # all of them, with their captions

Numbers come from ``experiments.analysis``. This package computes only quantiles and histograms, so that a million runs
become as few marks as a thousand. Every figure has a caption with its n. If its data are missing, ``NoDataError`` says
why it is not drawn. NaN and infinite values are drawn as such.
"""

import lazy_loader

# The stub beside this file lists the exported names and their modules; a module is loaded when a name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
