"""The report of a campaign: one HTML file that needs nothing else, and a summary table beside it.

    from experiments.report import write_report
    write_report(CampaignFolder(Path("results/default")))      # report.html and summary.csv in that folder

Everything in the page is an aggregate, but for the ten worst runs: its size does not grow with the number of runs. The
numbers come from ``experiments.analysis``, the drawings from ``experiments.figures``; here they are put into words and
tables. Tables, ``summary.csv`` and the JSON block in the page hold the same numbers.

Public names: ``write_report``.
"""

import lazy_loader

# What is handed on, and from where, stands in the stub beside; nothing is loaded before it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
