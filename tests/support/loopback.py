"""An sshd of the tests' own on a port of this machine: own keys, a home of their own for the sessions."""

import contextlib
import getpass
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.ports import free_port

from hookmap.cli.main import main

_SSHD = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/hostkey
PidFile none
AuthorizedKeysFile {folder}/id.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv HOME={home}
"""
_SSH = """
Host box
  Port {port}
Host nobody-there
  Port {closed}
Host *
  HostName 127.0.0.1
  User {user}
  IdentityFile {folder}/id
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking accept-new
  LogLevel ERROR
"""


@dataclass(frozen=True)
class Loopback:
    """A host called box, which is this machine."""

    home: Path
    ssh: str

    def run(self, *args: str) -> Result:
        return CliRunner().invoke(main, ["deploy", *args], env={"HOOKMAP_SSH": self.ssh})


@contextlib.contextmanager
def loopback(folder: Path) -> Iterator[Loopback]:
    """A running sshd. Skips the test where there is none, or where it may not run."""
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("no OpenSSH here")
    home, port = folder / "home", free_port()
    home.mkdir()
    for name in ("hostkey", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    words = {"port": port, "closed": free_port(), "folder": folder, "home": home, "user": getpass.getuser()}
    (folder / "sshd_config").write_text(_SSHD.format(**words))
    (folder / "ssh_config").write_text(_SSH.format(**words))
    command = [sshd, "-D", "-e", "-f", str(folder / "sshd_config")]
    if os.getuid() == 0 and not Path("/run/sshd").exists():  # sshd wants it of root: in a mount namespace of its own
        inside = f"mount -t tmpfs none /run && mkdir /run/sshd && exec {shlex.join(command)}"
        command = ["unshare", "--mount", "sh", "-c", inside]
    with open(folder / "sshd.log", "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait(process, port, folder / "sshd.log")
        yield Loopback(home, f"ssh -F {shlex.quote(str(folder / 'ssh_config'))}")
    finally:
        process.terminate()
        process.wait()


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    pytest.skip(f"sshd does not run here: {log.read_text(errors='replace').strip()[-200:]}")
