"""Runs the command line from a checkout: `python cli.py discover MODEL`."""

import sys

from hookmap.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
