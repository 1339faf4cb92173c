"""The command line, as `hookmap` and as `python -m hookmap`."""

import sys


def run() -> None:
    """Run the command line; where it cannot be imported, say what is missing."""
    try:
        from hookmap.cli.main import main
    except ModuleNotFoundError as error:
        if (error.name or "hookmap").partition(".")[0] == "hookmap":
            raise
        sys.exit(
            f"error: hookmap's commands need {error.name}, which is not installed here. "
            "Install all that they need: pip install hookmap (hookmap.light does without)"
        )
    main(prog_name="hookmap")


if __name__ == "__main__":
    run()
