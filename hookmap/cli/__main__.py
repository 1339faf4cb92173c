"""`python -m hookmap.cli` is `python -m hookmap`."""

from hookmap.cli.main import main

main(prog_name="hookmap")
