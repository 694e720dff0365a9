"""Runs work in fresh processes that start in milliseconds: forked from one that has torch and no model.

Run as `python -m pytest_inferencepio.measure.zygote MODULE ...`: imports the modules, then answers each JSON
line on standard input with one on standard output. Its own memory is what every child starts from. It never
runs a torch operation, because threads of a pool do not survive a fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, BinaryIO

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def serve(modules: list[str], requests: BinaryIO, replies: BinaryIO) -> None:
    """Import `modules`, then fork once per request until standard input ends."""
    for name in modules:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").is_dir() else 1
    _reply(replies, {"ready": True, "threads": threads})
    for line in requests:
        _reply(replies, run_forked(json.loads(line)))


def run_forked(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, run `request["work"]` with `request["arguments"]`, wait at most `request["timeout"]` seconds.

    Returns the child's report, or {"error": ..., "output": what it wrote} when it failed, died or ran late.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.close(reading)
            _child(request, writing, output.fileno())
        os.close(writing)
        report = _read_until(reading, time.monotonic() + request["timeout"])
        os.close(reading)
        reply = _judge(child, report, request)
        if "error" in reply:
            output.seek(0)
            reply["output"] = output.read()[-4000:].decode(errors="replace")
        return reply


def _judge(child: int, report: bytes | None, request: dict[str, Any]) -> dict[str, Any]:
    if report is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if report is None:
        return {"error": f"ran longer than {request['timeout']:g} s and was killed"}
    if report:
        return dict(json.loads(report))
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return {"error": f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")}
    return {"error": f"failed (status {os.waitstatus_to_exitcode(status)})"}


def _read_until(descriptor: int, deadline: float) -> bytes | None:
    """Everything until end of file, or None when the deadline passes first."""
    received = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return None
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return received
        received += piece


def _child(request: dict[str, Any], writing: int, output: int) -> None:
    """The forked side: never returns."""
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        _send(writing, _work(request))
        status = 0
    finally:
        if status:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(request: dict[str, Any]) -> dict[str, Any]:
    module, _, name = request["work"].partition(":")
    import torch

    torch.set_num_threads(request["threads"])
    reset = reset_peak()
    start = time.perf_counter()
    result = getattr(importlib.import_module(module), name)(**request["arguments"])
    seconds = time.perf_counter() - start
    return {"result": result, "peak": peak_bytes(), "peak_was_reset": reset, "seconds": seconds}


def reset_peak() -> bool:
    """Set this process's recorded peak to what it has resident now; False where the system cannot."""
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5")
        return True
    return False


def peak_bytes() -> int:
    """Highest resident memory of this process since its start or `reset_peak`, in bytes."""
    if STATUS.is_file():
        return _status("VmHWM")
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes (Linux)."""
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def _send(descriptor: int, message: dict[str, Any]) -> None:
    with os.fdopen(descriptor, "wb", closefd=False) as stream:
        stream.write(json.dumps(message).encode())


def _reply(stream: BinaryIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    # Replies own the real standard output; whatever the imports print goes to standard error.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.argv[1:], sys.stdin.buffer, replies)
