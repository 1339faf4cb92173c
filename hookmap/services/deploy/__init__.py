"""`hookmap deploy`: sends this hookmap to a host over plain ssh, and keeps a server running there.

    bundle.py     what is sent: hookmap's code, its requirements, a lock, and the program for the host
    over_ssh.py   one ssh connection: a tar on stdin, progress on stderr, the result on stdout
    enter.sh      runs first on the host: finds Python, unpacks the tar, starts the program
    on_host/      the program: does the work there, with Python's standard library alone

Everything on the host lives in one folder, and one folder runs one server:

    venv/           the dependencies (not with --python)
    releases/ID/    hookmap's code, the server's PYTHONPATH; ID is a digest of the code
    run.sh          starts the server; written at each deployment
    env             optional, yours: NAME=value lines for the server, such as HF_TOKEN=…
    key             the server's bearer key, readable by its owner alone
    pid, server.json, server.log, server.log.1, sessions/
"""
