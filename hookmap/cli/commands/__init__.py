"""One file for each command: `<name>.py` holds a click command called `command`. Adding a file adds the command.

Only click is imported at the top of these files, so that `hookmap --help` answers at once.
"""
