"""A thread that reads layers from disk, in the order they run, into a ring of buffers ahead of the compute."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import threading
import time
from collections.abc import Sequence

import torch

from optimizations.storage.stream_file import Record, check_tensor
from optimizations.storage.unnamed_file import StreamError, StreamFile, read_into


@dataclasses.dataclass
class StreamingReport:
    """What streaming did so far; times in seconds.

    `passes` counts forwards that reached the first streamed layer; in decoding at batch 1 a pass is a token.
    `stall_seconds` is how long compute waited for the disk, `read_seconds` how long the reader thread read.
    `directory` is where the file lies; it has no name there. `direct` tells whether reads went past the page cache
    with O_DIRECT; if not, `note` says what was done.
    """

    directory: str = ""
    file_bytes: int = 0
    streamed_layers: int = 0
    pinned_layers: int = 0
    buffers: int = 0
    direct: bool = True
    note: str = ""
    passes: int = 0
    layers_read: int = 0
    bytes_read: int = 0
    bytes_per_pass: int = 0
    read_seconds: float = 0.0
    stall_seconds: float = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes per second while reading; 0 before the first read."""
        return self.bytes_read / self.read_seconds if self.read_seconds else 0.0


class LayerRing:
    """Records of a stream file in `buffers` buffers: one in use, the others being filled with what comes next.

    Reading number s (0, 1, 2, …) is layer s mod n and goes to buffer s mod `buffers`, so after the last layer
    the first of the next forward is read. A layer out of turn (a forward that failed half-way) restarts the
    order there. In a forked child the thread is started anew.
    """

    def __init__(
        self, file: StreamFile, records: Sequence[Record], buffers: int, report: StreamingReport
    ) -> None:
        self.file = file
        self.records = records
        self.report = report
        size = max(record.nbytes for record in records)
        # Private, so that a forked child and its parent do not read into the same memory.
        self._maps = [
            mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(buffers)
        ]
        self.buffers = [torch.frombuffer(each, dtype=torch.uint8) for each in self._maps]
        self._descriptor, report.direct, report.note = open_past_cache(file)
        self._unchecked = set(range(len(records)))
        self._closed = False
        self._start(0)

    def _start(self, first: int) -> None:
        self._process = os.getpid()
        self._change = threading.Condition()
        self._next = self._done = first  # reading to begin; first reading not yet released
        self._ready: set[int] = set()
        self._held: int | None = None
        self._reading = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="layer-reader", daemon=True)
        self._thread.start()

    def acquire(self, layer: int) -> int:
        """Wait until `layer` is in memory and keep it there; returns the index of its buffer.

        Raises:
            StreamError: the file could not be read or is damaged.
        """
        if self._closed:
            raise StreamError(f"{self.file} is closed: layer_streaming was undone; apply it again")
        if self._process != os.getpid():
            self._start(layer)
        with self._change:
            self._free_held()
            if self._done % len(self.records) != layer:
                self._restart(layer)
            wanted, start = self._done, time.perf_counter()
            while wanted not in self._ready and self._error is None:
                self._change.wait()
            self.report.stall_seconds += time.perf_counter() - start
            if wanted not in self._ready and self._error is not None:
                raise self._error
            self.report.passes += layer == 0
            self._held = wanted
            return wanted % len(self.buffers)

    def release(self) -> None:
        """The layer in use has run: its buffer may be filled again. Does nothing if none is in use."""
        if self._process == os.getpid():
            with self._change:
                self._free_held()

    def _free_held(self) -> None:
        if self._held is not None:
            self._ready.discard(self._held)
            self._done, self._held = self._held + 1, None
            self._change.notify_all()

    def close(self) -> None:
        """Stop the thread and close the file."""
        if self._closed:
            return
        self._closed = True
        if self._process == os.getpid():
            with self._change:
                self._change.notify_all()
            self._thread.join()
        os.close(self._descriptor)

    def _restart(self, layer: int) -> None:
        """Continue the order at `layer`, once a read under way is over."""
        while self._reading:
            self._change.wait()
        count = len(self.records)
        self._next = self._done = self._done + (layer - self._done) % count
        self._ready.clear()
        self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._closed and not self._room():
                    self._change.wait()
                if self._closed:
                    return
                number, self._reading = self._next, True
                self._next += 1
            error = self._read(number)
            with self._change:
                self._reading, self._error = False, error
                if error is None:
                    self._ready.add(number)
                self._change.notify_all()

    def _room(self) -> bool:
        return self._error is None and self._next < self._done + len(self.buffers)

    def _read(self, number: int) -> OSError | StreamError | None:
        """Fill the buffer of reading `number`; the error is handed to whoever waits for the layer."""
        layer = number % len(self.records)
        record = self.records[layer]
        data = memoryview(self._maps[number % len(self._maps)])[: record.nbytes]
        start = time.perf_counter()
        try:
            self._fill(record, data)
            seconds = time.perf_counter() - start
            if layer in self._unchecked:
                for place in record.places:
                    check_tensor(self.file, layer, place, data[place.offset : place.offset + place.nbytes])
                self._unchecked.discard(layer)
        except StreamError as error:
            return error
        except OSError as error:
            return StreamError(
                f"reading layer {layer} from {self.file} failed: {error.strerror}; load the model again"
            )
        self.report.read_seconds += seconds
        self.report.layers_read += 1
        self.report.bytes_read += record.nbytes
        return None

    def _fill(self, record: Record, data: memoryview) -> None:
        done = read_into(self._descriptor, data, record.offset)
        if done < record.nbytes:
            raise StreamError(
                f"{self.file} ended at byte {record.offset + done}: it was truncated; load the model again"
            )
        if not self.report.direct:
            os.posix_fadvise(self._descriptor, record.offset, record.nbytes, os.POSIX_FADV_DONTNEED)


def open_past_cache(file: StreamFile) -> tuple[int, bool, str]:
    """A descriptor for reading, whether O_DIRECT holds, and a note where it does not.

    File systems in memory (tmpfs) and some network ones refuse O_DIRECT; there, pages are dropped after use.
    """
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        with contextlib.suppress(OSError):
            descriptor = os.open(file.path, os.O_RDONLY | flag)
            try:
                os.preadv(descriptor, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
            except OSError:
                os.close(descriptor)
                raise
            return descriptor, True, ""
    note = "O_DIRECT is refused here; read through the page cache and dropped from it after use"
    return os.dup(file.descriptor), False, note
