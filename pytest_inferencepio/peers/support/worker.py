"""The near end of a worker process that answers JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_inferencepio.errors import MeasurementFailed

_TAIL = 2000  # characters of its output that go into an error


class Worker:
    """`python -m module` with this process's import path.

    `who` names it in errors, `advice` says what to do when a signal ended it.
    """

    def __init__(self, module: str, who: str, advice: str = "") -> None:
        self.who, self.advice = who, advice
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env={**os.environ, "PYTHONPATH": _search_path()},
            start_new_session=True,  # Ctrl-C is handled here, which then closes it
        )

    def ask(self, request: Mapping[str, Any], timeout: float = 600.0) -> dict[str, Any]:
        """Its reply to one request.

        Raises:
            MeasurementFailed: it answered with an error, ended, or took longer than `timeout` s.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then it has ended, which reading says with its status
            self._process.stdin.write(json.dumps(dict(request)).encode() + b"\n")
            self._process.stdin.flush()
        reply = dict(json.loads(self._line(timeout)))
        if "error" in reply:
            raise MeasurementFailed(f"{self.who} failed: {reply['error']}{self._tail()}")
        return reply

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what it was never able to read
                    stream.close()
        self._output.close()

    def _line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        deadline, received = time.monotonic() + timeout, b""
        while not received.endswith(b"\n"):
            left = max(deadline - time.monotonic(), 0)
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise MeasurementFailed(f"{self.who} did not answer within {timeout:g} s{self._tail()}")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise MeasurementFailed(f"{self.who} ended ({self._ending()}){self._tail()}")
            received += piece
        return received

    def _ending(self) -> str:
        status = self._process.wait()
        if status >= 0:
            return f"status {status}"
        return "; ".join(filter(None, (f"signal {signal.Signals(-status).name}", self.advice)))

    def _tail(self) -> str:
        """The end of what it wrote to standard error, on lines of its own."""
        self._output.seek(0)
        text = self._output.read().decode(errors="replace").strip()
        return f"\n{text[-_TAIL:]}" if text else ""


def _search_path() -> str:
    return os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
