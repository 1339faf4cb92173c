"""`python -m hookmap.cli` is the command line too."""

from hookmap.cli.main import main

main(prog_name="hookmap")
