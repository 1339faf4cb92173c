"""The command line. `main` is the entry; each command is one file of `commands`."""
