"""Fresh processes for measuring: starts the zygote, sends it work, reports its failures in words."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pytest_inferencepio.catalog.entries import ENTRIES
from pytest_inferencepio.errors import MeasurementFailed, NotMeasurable

# What every child has before it loads a model: importing takes 5 s on a slow core, forking takes none. The
# catalog's architectures and all techniques are among it, so that importing code counts as nobody's peak.
PRELOAD = (
    "torch",
    "transformers",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "pytest_inferencepio.measure.fresh",
    *(f"transformers.models.{e.model_type}.modeling_{e.model_type}" for e in ENTRIES.values()),
)
START_SECONDS = 180.0
# numpy's linear algebra would otherwise start threads at import, which a fork does not carry over.
# glibc takes blocks from its heap or from the system by a threshold that moves with what was freed before, and a heap
# shrinks only at its end: equal processes with a tiny model peaked 10 MB apart, by the order in which threads came.
# With everything above 64 KiB a mapping of its own and one heap for all threads they are within 0.6 MB: the peak
# is what tensors take.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a child returned, its peak resident bytes, and the seconds its work took."""

    result: Any
    peak: int
    peak_was_reset: bool
    seconds: float


class FreshProcesses:
    """A zygote and the children it forks; close it, or use it as a context manager."""

    def __init__(self, preload: Sequence[str] = PRELOAD, threads: int = 1) -> None:
        if not hasattr(os, "fork"):
            raise NotMeasurable("peak memory needs processes that can fork, which this system has not")
        self.threads = threads
        self._reports: dict[str, Report] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest_inferencepio.measure.zygote", *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": _search_path()},
            start_new_session=True,  # Ctrl-C is handled here, which then closes the zygote
        )
        atexit.register(self.close)
        ready = self._receive(START_SECONDS)
        if ready["threads"] != 1:
            self.close()
            raise MeasurementFailed(
                f"importing {', '.join(preload)} started {ready['threads'] - 1} threads, which a fork loses"
            )

    def run(self, work: str, arguments: Mapping[str, Any], timeout: float = 600.0) -> Report:
        """Run `work` ("module:function") with JSON arguments in a process of its own.

        Raises:
            MeasurementFailed: it raised (with its traceback), was killed, or took longer than `timeout` s.
        """
        request = {"work": work, "arguments": dict(arguments), "timeout": timeout, "threads": self.threads}
        self._send(request)
        reply = self._receive(timeout + 30)
        if "error" in reply:
            raise MeasurementFailed(f"{work} in a fresh process {reply['error']}\n{reply['output']}".rstrip())
        return Report(**reply)

    def run_once(self, work: str, timeout: float = 600.0) -> Report:
        """`run(work, {})`, and from then on what it reported: for work that does the same every time."""
        if work not in self._reports:
            self._reports[work] = self.run(work, {}, timeout)
        return self._reports[work]

    def close(self) -> None:
        """End the zygote; a child it is waiting for ends with it."""
        atexit.unregister(self.close)
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: the zygote and its children
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        if self._process.poll() is not None:
            raise MeasurementFailed(
                f"the process that starts fresh processes has ended (status {self._process.returncode}); "
                "start another one"
            )
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, timeout: float) -> dict[str, Any]:
        """One line from the zygote."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        received = b""
        while not received.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
            piece = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                reason = "does not answer" if not ready else f"ended (status {self._process.wait()})"
                self.close()
                raise MeasurementFailed(
                    f"the process that starts fresh processes {reason}; see its output above"
                )
            received += piece
        return dict(json.loads(received))


def _search_path() -> str:
    """This process's import path, so that the zygote finds the same modules (a user's conftest adds some)."""
    return os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
