"""Memory of a checkpoint that transformers has mapped: let go of what was read, copy what is kept.

transformers maps safetensors files and hands out views. Reading them makes their pages resident, and one view that stays
in the model (a norm) keeps a whole file mapped: a model packed to a third would still show its checkpoint's size as
resident memory. The pages are clean and private, so giving them back loses nothing: the next touch reads them again.
"""

from __future__ import annotations

import bisect
import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4


class CheckpointPages:
    """Address ranges of the safetensors files mapped now (none where the system does not list mappings)."""

    def __init__(self) -> None:
        self._ranges = sorted(_mapped_checkpoints()) if _MAPS.is_file() else []
        self._starts = [start for start, _ in self._ranges]

    def release(self) -> None:
        """Give the resident pages of all mapped files back to the system."""
        if self._ranges and sys.platform.startswith("linux"):
            madvise = ctypes.CDLL(None).madvise
            for start, end in self._ranges:
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(_MADV_DONTNEED))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a view of a mapped file."""
        if tensor.is_meta or tensor.device.type != "cpu":
            return False
        address = tensor.data_ptr()
        place = bisect.bisect_right(self._starts, address) - 1
        return place >= 0 and address < self._ranges[place][1]

    def own(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give those of `tensors` that are views of a mapped file memory of their own."""
        for tensor in tensors:
            if self.holds(tensor):
                tensor.data = tensor.data.clone()


def _mapped_checkpoints() -> Iterable[tuple[int, int]]:
    for line in _MAPS.read_text().splitlines():
        if line.endswith(".safetensors"):
            start, _, end = line.split(maxsplit=1)[0].partition("-")
            yield int(start, 16), int(end, 16)
