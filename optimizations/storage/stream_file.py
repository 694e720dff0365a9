"""The file layers are streamed from: aligned records of raw tensor memory behind a checksummed header.

    magic (8 bytes) · header length (u64) · CRC-32 of the header (u32) · header (JSON), padded to 4096
    record of layer 0, padded to 4096 · record of layer 1 · …

The header comes last: a file that begins with one is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optimizations.errors import Refusal
from optimizations.storage.unnamed_file import CHUNK, StreamError, StreamFile

MAGIC = b"PIOLAYR1"
PREFIX = struct.Struct("<8sQI")
PAGE = 4096  # O_DIRECT needs offsets, lengths and addresses aligned to the device's blocks; 4 KiB covers all
TENSOR_ALIGNMENT = 64  # a cache line, and what vector kernels like
UNSET = 2**32  # longer than any CRC-32, so that the header never grows when the sums are filled in


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """One tensor's memory in its layer's record: `offset` and `nbytes` in bytes, strides in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    crc: int = UNSET

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of a record's memory, uint8 [>= offset + nbytes]."""
        flat = buffer[self.offset : self.offset + self.nbytes].view(getattr(torch, self.dtype))
        return flat.as_strided(self.shape, self.stride)


@dataclasses.dataclass(frozen=True)
class Record:
    """One layer in the file: `offset` and `nbytes` are multiples of 4096."""

    offset: int
    nbytes: int
    places: tuple[TensorPlace, ...]


def plan(layers: Sequence[Mapping[str, torch.Tensor]]) -> list[Record]:
    """Where each tensor of each layer will lie. Shapes and strides suffice: tensors may be on the meta device."""
    bodies = [_places(tensors) for tensors in layers]
    start = _aligned(PREFIX.size + len(_header(_records(bodies, 0))) + 16 * len(bodies), PAGE)
    return _records(bodies, start)


def _places(tensors: Mapping[str, torch.Tensor]) -> list[TensorPlace]:
    places, end = [], 0
    for name, tensor in tensors.items():
        stride = tensor.stride() if _dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
        dtype = str(tensor.dtype).removeprefix("torch.")
        offset = _aligned(end, TENSOR_ALIGNMENT)
        places.append(TensorPlace(name, dtype, tuple(tensor.shape), tuple(stride), offset, tensor.nbytes))
        end = offset + tensor.nbytes
    return places


def _records(bodies: Sequence[Sequence[TensorPlace]], start: int) -> list[Record]:
    records = []
    for places in bodies:
        nbytes = _aligned(places[-1].offset + places[-1].nbytes if places else 0, PAGE)
        records.append(Record(start, nbytes, tuple(places)))
        start += nbytes
    return records


def _aligned(value: int, step: int) -> int:
    return -(-value // step) * step


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlap, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _header(records: Sequence[Record]) -> bytes:
    return json.dumps([dataclasses.asdict(record) for record in records]).encode()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor in storage order, without a copy where it is dense."""
    dense = tensor.detach() if _dense(tensor) else tensor.detach().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


class StreamWriter:
    """Writes a stream file tensor by tensor, in any order; nothing of it stays in memory.

    Raises:
        Refusal: the directory cannot be written or lacks the room; says how much is missing.
    """

    def __init__(self, directory: str, records: Sequence[Record]) -> None:
        self.records = list(records)
        self.size = records[-1].offset + records[-1].nbytes
        self.directory = Path(directory or tempfile.gettempdir())
        self._sums: dict[tuple[int, str], int] = {}
        self._check_room()
        try:
            self.file = StreamFile(self.directory)
        except OSError as error:
            raise Refusal(
                f"layer_streaming cannot write to {self.directory}: {error.strerror}; "
                "name another directory with directory=..."
            ) from error
        try:
            os.posix_fallocate(self.file.descriptor, 0, self.size)
        except OSError as error:
            self.discard()
            raise Refusal(
                f"layer_streaming needs {_mib(self.size)} in {self.directory}: {error.strerror}; "
                "name another directory with directory=..."
            ) from error

    def _check_room(self) -> None:
        if not self.directory.is_dir():
            raise Refusal(f"layer_streaming: {self.directory} is not a directory; create it or name another")
        free = shutil.disk_usage(self.directory).free
        if free < self.size:
            raise Refusal(
                f"layer_streaming needs {_mib(self.size)} in {self.directory} and {_mib(free)} are free; "
                f"free {_mib(self.size - free)}, name another directory with directory=..., or raise pin_layers"
            )

    def write(self, layer: int, name: str, tensor: torch.Tensor) -> None:
        """Store one tensor; its shape and dtype must be the planned ones (ValueError)."""
        record = self.records[layer]
        place = next(each for each in record.places if each.name == name)
        if tuple(tensor.shape) != place.shape or str(tensor.dtype) != f"torch.{place.dtype}":
            raise ValueError(
                f"layer {layer}'s {name} was planned as {place.dtype} {place.shape}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tuple(tensor.stride()) != place.stride:
            tensor = torch.empty_strided(place.shape, place.stride, dtype=tensor.dtype).copy_(tensor)
        data = tensor_bytes(tensor)
        done, start = 0, record.offset + place.offset
        while done < len(data):
            done += os.pwrite(self.file.descriptor, data[done : done + CHUNK], start + done)
        self._sums[layer, name] = zlib.crc32(data)

    def finish(self) -> StreamFile:
        """Write the header, which makes the file complete.

        Raises:
            StreamError: a planned tensor was never written.
        """
        self.records = [self._summed(index, record) for index, record in enumerate(self.records)]
        header = _header(self.records)
        prefix = PREFIX.pack(MAGIC, len(header), zlib.crc32(header))
        os.pwrite(self.file.descriptor, prefix + header, 0)
        os.fsync(self.file.descriptor)  # DONTNEED drops clean pages only
        os.posix_fadvise(self.file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return self.file

    def _summed(self, index: int, record: Record) -> Record:
        for place in record.places:
            if (index, place.name) not in self._sums:
                raise StreamError(
                    f"layer {index}'s {place.name} was never written to {self.file}: load the model with all its weights"
                )
        places = [dataclasses.replace(place, crc=self._sums[index, place.name]) for place in record.places]
        return dataclasses.replace(record, places=tuple(places))

    def discard(self) -> None:
        """Close the unfinished file; also done when the writer is dropped or the process ends."""
        self.file.close()


def read_header(file: StreamFile) -> list[Record]:
    """Records of a finished stream file.

    Raises:
        StreamError: closed, without a header, a damaged header, or fewer bytes than it promises.
    """
    try:
        size = file.size
        prefix = os.pread(file.descriptor, PREFIX.size, 0)
        if len(prefix) < PREFIX.size or prefix[:8] != MAGIC:
            raise StreamError(f"{file} has no header: it was overwritten or truncated; load the model again")
        _, length, crc = PREFIX.unpack(prefix)
        header = os.pread(file.descriptor, min(length, size), PREFIX.size)
    except OSError as error:
        raise StreamError(f"{file} cannot be read: {error.strerror}; load the model again") from error
    if zlib.crc32(header) != crc:
        raise StreamError(f"the header of {file} is damaged (its checksum differs); load the model again")
    records = [_record(entry) for entry in json.loads(header)]
    if size < records[-1].offset + records[-1].nbytes:
        raise StreamError(
            f"{file} has {size} bytes and its header promises {records[-1].offset + records[-1].nbytes}: "
            "it was truncated; load the model again"
        )
    return records


def _record(entry: dict[str, Any]) -> Record:
    places = tuple(
        TensorPlace(**{**place, "shape": tuple(place["shape"]), "stride": tuple(place["stride"])})
        for place in entry["places"]
    )
    return Record(entry["offset"], entry["nbytes"], places)


def check_tensor(file: StreamFile, layer: int, place: TensorPlace, data: memoryview) -> None:
    """Compare a tensor's memory with its checksum; StreamError names the tensor when it differs."""
    if zlib.crc32(data) != place.crc:
        raise StreamError(
            f"layer {layer}'s {place.name} in {file} is damaged (its checksum differs); load the model again"
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
