"""Layers of a model on the meta device whose weights go to disk as they are loaded, never all into memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from optimizations.storage.stream_file import StreamWriter, plan
from optimizations.storage.streamed_layers import placeholder
from optimizations.storage.unnamed_file import StreamFile


class DiskSink:
    """Takes each parameter of `layers` once, writes it to a stream file and leaves a placeholder.

    Modules that own parameters get `load_weight(name, tensor)`, `pending` and `keeps_input`, as loaders expect of
    converted modules; those that already have them (packed ones) are left alone. The file is made with the first weight.
    """

    def __init__(self, layers: Sequence[nn.Module], directory: str) -> None:
        self.layers = list(layers)
        self.directory = directory
        self.owners: dict[tuple[int, str], nn.Module] = {}
        self._writer: StreamWriter | None = None
        for index, layer in enumerate(layers):
            for prefix, module in layer.named_modules():
                if module._parameters:
                    self._adopt(index, prefix, module)

    def _adopt(self, index: int, prefix: str, module: Any) -> None:
        names = [name for name, parameter in module._parameters.items() if parameter is not None]
        module.pending = set(names)
        module.keeps_input = False  # each tensor is written and let go, so loaders may reuse its memory
        module.load_weight = functools.partial(self._take, index, module, prefix)
        for name in names:
            self.owners[index, f"{prefix}.{name}" if prefix else name] = module

    def _take(self, index: int, module: Any, prefix: str, name: str, tensor: torch.Tensor) -> None:
        if self._writer is None:
            self._writer = StreamWriter(self.directory, plan(self._named()))
        self._writer.write(index, f"{prefix}.{name}" if prefix else name, tensor.detach())
        parameter = nn.Parameter(placeholder(tensor), requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it alone
        module._parameters[name] = parameter
        module.pending.discard(name)

    def _named(self) -> list[dict[str, torch.Tensor]]:
        """The adopted parameters by layer and name, as they are now."""
        named: list[dict[str, torch.Tensor]] = [{} for _ in self.layers]
        for (index, name), module in self.owners.items():
            parameter = module._parameters[name.rpartition(".")[2]]
            assert parameter is not None
            named[index][name] = parameter
        return named

    def finish(self) -> tuple[list[dict[str, torch.Tensor]], StreamFile]:
        """Parameters by layer and name, and the finished file; the modules lose what they were given.

        Raises:
            StreamError: a weight never came.
        """
        tensors = self._named()
        if self._writer is None:
            self._writer = StreamWriter(self.directory, plan(tensors))
        file = self._writer.finish()
        for module in set(self.owners.values()):
            del module.pending, module.keeps_input, module.load_weight
        return tensors, file
