"""Decoder layers whose tensors live in a stream file and pass through memory while they run."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from optimizations.storage.layer_ring import LayerRing, StreamingReport
from optimizations.storage.stream_file import (
    Record,
    StreamWriter,
    check_tensor,
    plan,
    read_header,
    tensor_bytes,
)
from optimizations.storage.unnamed_file import StreamError, StreamFile, read_into


def layer_tensors(model: nn.Module, layers: Sequence[nn.Module]) -> list[dict[str, torch.Tensor]]:
    """Parameters and buffers by name, per layer, without those that something outside the layers shares."""
    inside = {id(tensor) for layer in layers for tensor in _tensors(layer).values()}
    outside = {_address(each) for each in _tensors(model).values() if id(each) not in inside}
    seen: set[int] = set()
    found = []
    for layer in layers:
        own = {}
        for name, tensor in _tensors(layer).items():
            if id(tensor) not in seen and tensor.numel() and _address(tensor) not in outside:
                own[name] = tensor
                seen.add(id(tensor))
        found.append(own)
    return found


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def _address(tensor: torch.Tensor) -> tuple[int, int]:
    """Equal for tensors that share memory exactly; tensors without memory are all different."""
    return (id(tensor), 0) if tensor.is_meta or not tensor.numel() else (tensor.data_ptr(), tensor.nbytes)


def placeholder(tensor: torch.Tensor) -> torch.Tensor:
    """Same shape and dtype on one element of memory: NaN, or 0 for integers, so that a stray use shows."""
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((1,), value, dtype=tensor.dtype).expand(tensor.shape)


def write_layers(directory: str, layers: Sequence[Mapping[str, torch.Tensor]]) -> StreamFile:
    """Write the tensors of each layer to a new stream file, then free their memory (placeholders stay).

    Raises:
        Refusal: no room, or no directory.
        StreamError: writing failed; all tensors are as they were.
    """
    writer = StreamWriter(directory, plan(layers))
    try:
        for index, tensors in enumerate(layers):
            for name, tensor in tensors.items():
                writer.write(index, name, tensor)
        file = writer.finish()
    except OSError as error:
        writer.discard()
        raise StreamError(
            f"writing {writer.file} failed: {error.strerror}; name another directory with directory=..."
        ) from error
    for tensors in layers:
        for tensor in tensors.values():
            tensor.data = placeholder(tensor)
    return file


class StreamedLayers:
    """Hooks on `layers` that bring each one's tensors into memory before it runs.

    The `nn.Parameter` and buffer objects stay the same; only where their data lies changes. Between two runs of
    a layer they are placeholders.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        tensors: Sequence[Mapping[str, torch.Tensor]],
        file: StreamFile,
        buffers: int,
    ) -> None:
        self.layers = list(layers)
        self.tensors = [dict(each) for each in tensors]
        self.file = file
        self.report = StreamingReport(str(file.directory), file.size, len(layers), buffers=buffers)
        self.records = read_header(file)
        self.report.bytes_per_pass = sum(record.nbytes for record in self.records)
        self.ring = LayerRing(file, self.records, buffers, self.report)
        self._end = weakref.finalize(model, _abandon, self.ring, file)
        self._views = [
            [[place.view(buffer) for place in record.places] for buffer in self.ring.buffers]
            for record in self.records
        ]
        self._empty = [[placeholder(each) for each in tensors.values()] for tensors in self.tensors]
        self._handles: list[Any] = []

    def install(self) -> None:
        """Put the hooks in place: the first to run before a layer, the last after it."""
        for index, layer in enumerate(self.layers):
            before = layer.register_forward_pre_hook(_Before(self, index), prepend=True, with_kwargs=True)
            after = layer.register_forward_hook(_After(self, index), always_call=True)
            self._handles += [before, after]

    def bring(self, index: int) -> None:
        """Point the layer's tensors at its data in memory."""
        self._point(index, self._views[index][self.ring.acquire(index)])

    def drop(self, index: int) -> None:
        """The layer has run: placeholders for its tensors, its buffer free for the next."""
        self._point(index, self._empty[index])
        self.ring.release()

    def _point(self, index: int, data: Sequence[torch.Tensor]) -> None:
        for tensor, memory in zip(self.tensors[index].values(), data, strict=True):
            tensor.data = memory

    def remove(self) -> None:
        """Take the hooks off, give every tensor its values back in memory of its own, close the file.

        Raises:
            StreamError: the file is damaged or cannot be read; the model must be loaded again.
        """
        for handle in self._handles:
            handle.remove()
        try:
            read_header(self.file)
            for index, record in enumerate(self.records):
                self._restore(index, record)
        except OSError as error:
            raise StreamError(
                f"{self.file} cannot be read: {error.strerror}; load the model again"
            ) from error
        finally:
            self._end()

    def _restore(self, index: int, record: Record) -> None:
        """Values of one layer, compared with their checksums."""
        for place in record.places:
            memory = torch.empty_strided(place.shape, place.stride, dtype=getattr(torch, place.dtype))
            data = tensor_bytes(memory)
            read_into(self.file.descriptor, data, record.offset + place.offset)
            check_tensor(self.file, index, place, data)
            self.tensors[index][place.name].data = memory


def _abandon(ring: LayerRing, file: StreamFile) -> None:
    """End of streaming, or of the model, or of the process."""
    ring.close()
    file.close()


class _Before:
    """Pre-hook of layer `index`."""

    def __init__(self, owner: StreamedLayers, index: int) -> None:
        self.owner = owner
        self.index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled() and any(
            isinstance(each, torch.Tensor) and each.requires_grad for each in (*args, *kwargs.values())
        ):
            raise RuntimeError(
                "layer_streaming overwrites a layer's weights after it ran, so there are no gradients: run under "
                "torch.no_grad() or torch.inference_mode()"
            )
        self.owner.bring(self.index)


class _After:
    """Forward hook of layer `index`, called on exceptions too."""

    def __init__(self, owner: StreamedLayers, index: int) -> None:
        self.owner = owner
        self.index = index

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.owner.drop(self.index)
