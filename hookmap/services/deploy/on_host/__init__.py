"""The program of `hookmap deploy` that runs on the host: `python3 on_host.pyz FOLDER/incoming.XXXXXX`.

It is sent as a zip and uses Python's standard library alone: the host has no other package yet.

    __main__.py     reads request.json, answers with one JSON object on stdout
    deployment.py   what a deployment does, in order
    folder.py       the server's folder and the files in it
    process.py      the server's process: its id, its health, how it is stopped
    environment.py  the interpreter with the dependencies
    runners.py      systemd, tmux or nothing: what keeps the server running
    commands.py     running a command, telling progress, failing with a message
    request.py      what is asked for; the sender imports it, too
"""
