#!/usr/bin/env python3
"""Run fault-injection campaigns: ``python run_sweep.py --help``."""

import sys

from experiments.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
