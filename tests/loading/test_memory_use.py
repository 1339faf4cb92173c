"""How much room there is, in a container too."""

from pathlib import Path

import psutil

from hookmap.loading.memory import available

MB = 10**6


def container(folder: Path, limit: str) -> Path:
    """What Linux says of a container that holds 900 MB, 600 of them pages of files."""
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{900 * MB}\n")
    stat = {"anon": 300 * MB, "file": 600 * MB, "inactive_file": 400 * MB, "active_file": 200 * MB}
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))
    return folder


def test_pages_of_files_are_room(tmp_path: Path) -> None:
    """After a download of weights they fill a container: a capture would be refused for nothing."""
    assert available(container(tmp_path, str(1000 * MB))) == 700 * MB


def test_a_container_without_a_limit_has_what_the_machine_has(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().available
    assert abs(available(container(tmp_path, "max")) - machine) < machine / 10
    assert abs(available(tmp_path / "nowhere") - machine) < machine / 10
