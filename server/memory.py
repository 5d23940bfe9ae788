"""How much memory this process may use: its cgroup's limit, not the machine's size."""

from __future__ import annotations

import os
from pathlib import Path


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use.

    The smallest of the machine's memory and the limits of the process's cgroup and of every group above it, for
    cgroup version 2 and 1.

    Parameters
    ----------
    root : Path
        Where ``proc`` and ``sys`` are found.
    """
    smallest = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _limit_files(root):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        # "max" (version 2) means none, as does version 1's number near 2^63.
        if text.isdecimal() and int(text) > 0:
            smallest = min(smallest, int(text))
    return smallest


def _limit_files(root: Path) -> list[Path]:
    """The limit files of the process's groups; inside a container the path may not exist, its root does."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        inner = base / group.lstrip("/")
        groups = [inner, *inner.parents]
        files += [folder / name for folder in groups[: groups.index(base) + 1]]
    return files
