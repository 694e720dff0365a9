"""Original weights set aside in a file, so that converting frees memory and undoing is exact."""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import Any, cast

import torch
from torch import nn

from optimizations.errors import OptimizationError

_CHUNK = 1 << 30  # bytes; one system call moves less than 2 GiB


class SetAside:
    """Parameters whose memory lies in an unnamed temporary file; `restore` gives it back, bit by bit.

    The `nn.Parameter` objects stay the same throughout; only their storage is empty in between. The file has no
    name and is closed with this object, so nothing is left behind whatever happens to the process.
    """

    def __init__(self) -> None:
        self._descriptor, path = tempfile.mkstemp(prefix="pio-weights-")
        os.unlink(path)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._stored: list[tuple[nn.Parameter, torch.Size, tuple[int, ...], int]] = []
        self._end = 0

    def store(self, parameter: nn.Parameter) -> None:
        """Write `parameter` to the file and free its memory.

        Raises:
            OptimizationError: the file system of temporary files is full; the parameter stays as it was.
        """
        data = parameter.detach()
        dense = data.contiguous()
        try:
            self._write(_bytes_of(dense))
        except OSError as error:
            raise OptimizationError(
                f"cannot set {dense.nbytes / 2**20:.1f} MiB of original weights aside in {tempfile.gettempdir()} "
                f"({error.strerror}); set TMPDIR to a directory with room, or convert while loading"
            ) from error
        self._stored.append((parameter, data.shape, data.stride(), self._end))
        self._end += dense.nbytes
        parameter.data = torch.empty(0, dtype=data.dtype)

    def restore(self) -> None:
        """Give every parameter its values back, in new memory of the original shape and strides; once."""
        while self._stored:
            parameter, shape, stride, start = self._stored.pop()
            dense = torch.empty(shape, dtype=parameter.dtype)
            self._read(_bytes_of(dense), start)
            if dense.stride() != stride:
                dense = torch.empty_strided(shape, stride, dtype=parameter.dtype).copy_(dense)
            parameter.data = dense
        self._close()

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done : done + _CHUNK], self._end + done)

    def _read(self, into: memoryview, start: int) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(self._descriptor, [into[done : done + _CHUNK]], start + done)
            if count == 0:
                raise OptimizationError(
                    "the file of original weights ended early; the model must be loaded again"
                )
            done += count


def _bytes_of(dense: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(cast(Any, dense.view(-1).view(torch.uint8).numpy()))
