"""`python -m hookmap` is the command line."""

from hookmap.cli.main import main

main(prog_name="hookmap")
