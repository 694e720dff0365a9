"""A file on disk that no directory lists, so that nothing is left of it however its process ends."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

from optimizations.errors import OptimizationError

CHUNK = 1 << 30  # bytes; one system call moves less than 2 GiB


class StreamError(OptimizationError):
    """A stream file that is closed, damaged or cannot be read; the message names it and the remedy."""


class StreamFile:
    """An empty file without a name on the file system of `directory`, open for reading and writing.

    Its disk space is free again when this object is closed or dropped, or when the process ends, killed ones too;
    with forked children, when the last of them has.

    Raises:
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # Where the file system lacks O_TMPFILE, it has a name until the next system call.
        made = tempfile.TemporaryFile(buffering=0, prefix="pio-layers-", dir=directory)  # noqa: SIM115  see _close
        self._file = made
        self._close = weakref.finalize(self, self._file.close)

    def __str__(self) -> str:
        return f"the file of streamed layers in {self.directory}"

    @property
    def descriptor(self) -> int:
        """Raises StreamError once closed: its number may be another file's by then."""
        if self._file.closed:
            raise StreamError(f"{self} is closed: layer_streaming was undone; apply it again")
        return self._file.fileno()

    @property
    def path(self) -> Path:
        """By which this process and its forked children open the file anew, with other flags."""
        return Path(f"/proc/self/fd/{self.descriptor}")

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def close(self) -> None:
        """Give the disk space back; does nothing the second time."""
        self._close()


def read_into(descriptor: int, memory: memoryview, offset: int) -> int:
    """Read from `offset` until `memory` is full or the file ends; returns the number of bytes read."""
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done : done + CHUNK]], offset + done)
        if count == 0:
            break
        done += count
    return done
