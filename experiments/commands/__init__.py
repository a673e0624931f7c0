"""The commands of ``run_sweep.py``, one module for each group."""
