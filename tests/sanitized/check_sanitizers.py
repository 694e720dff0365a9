"""What `make sanitize` begins with: the sanitized kernels are in use, also in children, and a read past the end is found.

Not collected by `make test`, where the kernels are not sanitized.
"""

from __future__ import annotations

import os
import subprocess
import sys

from optimizations.native.loader import native

READ = """
import torch
from optimizations.native.loader import native
print(native().__file__, flush=True)
words = torch.zeros(64, dtype=torch.int32)
native().stream_read(words.data_ptr(), {bytes}, 1)
print("read")
"""


def read(bytes: int) -> subprocess.CompletedProcess[str]:
    """A process that lets a kernel read so many of 256 bytes."""
    code = READ.format(bytes=bytes)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_sanitized_kernels_are_loaded() -> None:
    assert native().__file__ == os.environ["PIO_SANITIZED"]
    assert read(256).stdout.split() == [os.environ["PIO_SANITIZED"], "read"]


def test_a_read_past_the_end_is_found() -> None:
    done = read(512)
    assert done.returncode != 0
    assert "read" not in done.stdout.split()
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "src/stream_read.cc" in done.stderr
