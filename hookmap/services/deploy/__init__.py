"""`hookmap deploy`: brings this hookmap to a host over plain ssh, and keeps a server running there.

    request.py    what is wanted, as JSON
    bundle.py     what travels: this hookmap's code, its requirements, a lock
    over_ssh.py   one ssh connection: a tar on its stdin, progress on its stderr, a result on its stdout
    enter.sh      the first thing that runs on the host: finds Python, unpacks the tar
    on_host.py    does the work there, with Python's standard library alone

Everything on the host lives in one folder, and one folder runs one server:

    venv/           the dependencies (not with --python)
    releases/ID/    hookmap's code, on the server's PYTHONPATH; ID is a digest of it
    run.sh          starts the server; written anew each time
    env             yours, if you make one: NAME=value lines for the server, such as HF_TOKEN=…
    key             the server's bearer key, readable by its owner alone
    pid, server.json, server.log, server.log.1, sessions/
"""
