"""What tests of stream files ask of processes: work in a forked child, and which files without a name are open."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path


def run_in_child(work: Callable[[], object], end: Callable[[], object] = lambda: os._exit(0)) -> int:
    """Fork, let the child do `work` and `end` itself; its exit code (negative: the signal), 1 if `work` failed."""
    with warnings.catch_warnings():
        # Python 3.12 warns of forking with threads, which is the point here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
            end()
        finally:
            traceback.print_exc()
            os._exit(1)  # the test run goes on in the parent alone
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def open_files(directory: Path) -> set[str]:
    """Files on the disk space of `directory` that this process holds open without a name."""
    links = (os.path.realpath(each) for each in Path("/proc/self/fd").iterdir())
    return {link for link in links if link.startswith(f"{directory}/") and link.endswith(" (deleted)")}
