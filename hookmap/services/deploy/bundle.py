"""What is sent to the host: hookmap's code, its requirements, a lock with exact versions, and the program to run."""

import email
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hookmap._version import __version__
from hookmap.errors import DeployError
from hookmap.maps.shipped import mappings_folder

EXTRA = "server"
ON_HOST = Path(__file__).with_name("on_host")
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Bundle:
    """The files for the host."""

    version: str
    code: bytes
    """a zip with the layout of a wheel: the package with its maps, and its metadata"""
    requirements: str
    """a requirements file"""
    lock: str
    """exact versions, as a constraints file for pip"""

    @property
    def files(self) -> dict[str, bytes]:
        """By the names that `on_host` reads."""
        texts = {"requirements.txt": self.requirements, "lock.txt": self.lock}
        return {"code.zip": self.code, **{name: text.encode() for name, text in texts.items()}}


def bundle(release: str | None = None, lock: Path | None = None, installs: bool = True) -> Bundle:
    """Collect what is sent.

    `release`: a version on PyPI to send instead of the code that runs here. `lock`: a file of exact versions to use
    instead of those installed here. `installs`: whether the host will install anything; if not, no lock is needed.
    Raises DeployError where something that must be sent is missing.
    """
    code = installed_code() if release is None else released_code(release)
    with zipfile.ZipFile(io.BytesIO(code)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        told = email.message_from_bytes(archive.read(name))
    wanted = requirements(told.get_all("Requires-Dist") or ())
    text = lock.read_text(encoding="utf-8") if lock else "\n".join(locked(wanted)) if installs else ""
    if installs and re.search(r"^torch==", text, flags=re.MULTILINE) is None:
        raise DeployError(f"{lock} names no exact torch: expected a line such as torch==2.13.0")
    return Bundle(told["Version"], code, "".join(f"{requirement}\n" for requirement in wanted), text.rstrip() + "\n")


def installed_code() -> bytes:
    """The code that runs here, also from a checkout. The same files give the same bytes. Raises DeployError."""
    try:
        described = metadata.distribution("hookmap").read_text("METADATA")
    except metadata.PackageNotFoundError:
        described = None
    if described is None:
        raise DeployError("hookmap's code is here, and it is not installed: pip install -e FOLDER OF THE CHECKOUT")
    package = Path(__file__).resolve().parents[2]
    found = {f"hookmap/{name}": file for name, file in _files(package)}
    found |= {f"hookmap/mappings/{name}": file for name, file in _files(mappings_folder())}
    content = {name: file.read_bytes() for name, file in sorted(found.items())}
    return zipped(content | {f"hookmap-{__version__}.dist-info/METADATA": described.encode()})


def program() -> bytes:
    """The package `on_host` as a zip that `python3 on_host.pyz FOLDER` runs with the standard library alone."""
    package = "hookmap.services.deploy.on_host"
    parents = package.split(".")[:-1]
    # The packages above it are empty there: they win over a hookmap that the host's Python may have.
    content = {"/".join([*parents[:depth], "__init__.py"]): b"" for depth in range(1, len(parents) + 1)}
    content |= {f"{package.replace('.', '/')}/{name}": file.read_bytes() for name, file in _files(ON_HOST)}
    return zipped(content | {"__main__.py": f"from {package}.__main__ import main\n\nmain()\n".encode()})


def zipped(content: Mapping[str, bytes]) -> bytes:
    """These files, by name. The same files give the same bytes."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return made.getvalue()


def released_code(version: str) -> bytes:
    """The wheel that pip, as it is configured here, finds for this version. Raises DeployError."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder]
        done = subprocess.run([*command, f"hookmap=={version}"], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = (done.stderr.strip().splitlines() or ["pip found none"])[-1]
            raise DeployError(
                f"hookmap {version} cannot be had: {said}\nLeave --release out to send the one that is here."
            )
        return wheels[0].read_bytes()


def requirements(told: Sequence[str]) -> list[Requirement]:
    """Of the `Requires-Dist` lines, those that hookmap and its server need."""
    found = []
    for text in told:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and "extra" in str(marker):
            if marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": EXTRA}):
                continue
            requirement.marker = None
        found.append(requirement)
    return found


def locked(wanted: Sequence[Requirement]) -> list[str]:
    """`name==version` of each requirement and its dependencies, as installed here. Raises DeployError."""
    versions: dict[str, str] = {}
    missing: list[str] = []
    waiting = list(wanted)
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        # A local version (2.13.0+cpu) is this machine's own; a constraint without it accepts every build.
        versions[name] = Version(found.version).public
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += _needed(found.requires or (), extra)
    if missing:
        raise DeployError(
            f"not installed here, so that no version of it can be locked: {', '.join(sorted(missing))}.\n"
            'Install it: pip install "hookmap[server]", or give exact versions: --lock FILE'
        )
    return [f"{name}=={version}" for name, version in sorted(versions.items())]


def _needed(told: Sequence[str], extra: str) -> Iterator[Requirement]:
    """Of a package's requirements, those that apply on this machine."""
    for text in told:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in folder.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."):
            yield file.relative_to(folder).as_posix(), file
