"""How much memory is free, and how much a run takes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def available(cgroup: Path = _CGROUP) -> int:
    """Bytes that this process may still allocate: the machine's free memory, or the rest of its container's limit."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            held = int((cgroup / "memory.current").read_text(encoding="ascii"))
            counts = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
            # Cached pages of files count as used, and are freed when memory is needed.
            files = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
            free = min(free, int(limit) - held + files)
    except (OSError, ValueError):
        pass
    return max(0, free)


def used() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


@dataclass
class MemoryUse:
    """Bytes before and after a run, and the most of all measurements during it."""

    before: int = field(default_factory=used)
    peak: int = 0
    device: torch.device | None = None
    """a GPU whose memory is measured too"""
    device_before: int = 0

    def __post_init__(self) -> None:
        self.peak = self.before
        if self.device is not None:
            self.device_before = torch.cuda.memory_allocated(self.device)

    def look(self) -> int:
        """Measures now. For each batch, not for each token: it takes some ten microseconds."""
        now = used()
        self.peak = max(self.peak, now)
        return now

    def figures(self) -> Mapping[str, int]:
        """Bytes, for the log and the manifest."""
        after = self.look()
        found = {"before": self.before, "after": after, "peak": self.peak}
        if self.device is not None:
            found["device_before"] = self.device_before
            found["device_after"] = torch.cuda.memory_allocated(self.device)
            found["device_peak"] = torch.cuda.max_memory_allocated(self.device)
        return found
