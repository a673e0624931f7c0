"""The report of a campaign: one HTML file that needs nothing else, and a summary table beside it.

    from experiments.report import write_report
    write_report(CampaignFolder(Path("results/default")))      # report.html and summary.csv in that folder

Everything in the page is an aggregate, except the ten worst runs, so its size does not grow with the number of runs.
The numbers come from ``experiments.analysis`` and the drawings from ``experiments.figures``; this package puts them
into words and tables. The tables, ``summary.csv`` and the JSON block in the page have the same numbers.
"""

import lazy_loader

# The stub beside this file lists the exported names and their modules; a module is loaded when a name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
