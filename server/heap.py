"""glibc's heap set up for messages of megabytes, by starting the process again with tunables in its environment.

gRPC allocates every message on whichever of its threads reads it, and Arrow copies it into one piece. As glibc comes,
each thread has a heap of its own that keeps what it once needed, and every large block is mapped afresh and returned to
the kernel: receiving then costs more in page faults than in copying. Few heaps bound memory; with a single one, who
allocates while holding Python's lock waits for those who fetch megabytes from the kernel, for seconds when a hundred
streams fill. Huge pages and keeping what was freed save the faults. Together they take the server from 0.9 to 1.5 CPU
seconds a GiB of input to 0.8 to 0.9 at batches of 16 and 64 MiB (docs/benchmarks.md).
"""

from __future__ import annotations

import os
import platform
import sys

VARIABLE = "GLIBC_TUNABLES"
TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "arena_max": 2,
        "hugetlb": 1,
        "mmap_threshold": 2**32 - 1,  # never map a block
        "trim_threshold": 2**32 - 1,  # never return memory
    }.items()
)


def tune_heap() -> None:
    """Start this process again with :data:`TUNABLES`, unless the operator (or the first start) has set any.

    glibc reads them before any of our code runs; a later ``mallopt`` cannot choose huge pages and keeps the heaps that
    imported libraries' threads already have. glibc 2.36 cuts the variable after its first entry when it has read it,
    so whether it is set is all that can be asked.
    """
    if VARIABLE in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ[VARIABLE] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 -- this very command line, no shell
