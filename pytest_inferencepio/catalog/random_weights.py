"""Random weights for the published dimensions, made tensor by tensor straight into their final form.

Speed and memory of inference do not depend on the values, so they only have to be cheap, seeded and harmless:
matrices are cut out of one block of normal numbers (standard deviation 0.02, the initializer range of all four
models), norms are 1, biases 0. The block's length is prime, so that no two rows of a matrix coincide.
Copying makes 30 B parameters at memory speed; drawing them would take a quarter of an hour.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 1_048_573  # largest prime below 2^20
STANDARD_DEVIATION = 0.02
# What is drawn at a time for a module that packs piece by piece. The tied embedding of Qwen3-4B is 778 MB, a third of the
# packed model, the fused experts of one layer of the coder 805 MB.
PIECE_BYTES = 64 << 20


class RandomTensors:
    """Makes the tensors of one model: the same seed and the same order of calls give the same values."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(BLOCK, generator=generator).mul_(STANDARD_DEVIATION).to(dtype)
        self._offset = 0
        self._scratch = torch.empty(0, dtype=dtype)

    def borrowed(self, name: str, meta: torch.Tensor, device: str) -> torch.Tensor:
        """As `like`, in memory that the next call overwrites: fresh pages cost more than filling them."""
        if meta.dim() < 2 or meta.dtype != self._scratch.dtype or device != "cpu":
            return self.like(name, meta, device)
        if self._scratch.numel() < meta.numel():
            self._scratch = torch.empty(0, dtype=meta.dtype)  # the smaller one goes before the larger comes
            self._scratch = torch.empty(meta.numel(), dtype=meta.dtype)
        tensor = self._scratch[: meta.numel()].view(meta.shape)
        self._fill(tensor.view(-1))
        return tensor

    def like(self, name: str, meta: torch.Tensor, device: str) -> torch.Tensor:
        """A tensor of `meta`'s shape and dtype on `device`: what a parameter called `name` starts from."""
        if name.endswith("bias"):
            return torch.zeros(meta.shape, dtype=meta.dtype, device=device)
        if meta.dim() < 2:
            return torch.ones(meta.shape, dtype=meta.dtype, device=device)
        tensor = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        self._fill(tensor.view(-1))
        return tensor

    def _fill(self, flat: torch.Tensor) -> None:
        done = 0
        while done < flat.numel():
            count = min(BLOCK - self._offset, flat.numel() - done)
            flat[done : done + count].copy_(self._block[self._offset : self._offset + count])
            done += count
            self._offset = (self._offset + count) % BLOCK


def original_parameters(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Names and meta tensors before any conversion, tied parameters once."""
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


@torch.no_grad()
def materialize(
    model: PreTrainedModel, originals: list[tuple[str, torch.Tensor]], device: str, seed: int
) -> PreTrainedModel:
    """Give every parameter and buffer of a (possibly converted) meta model its memory and values.

    Args:
        model: built on the meta device; modules with `load_weight` convert what they are given.
        originals: `original_parameters` of the model before conversion.

    At no time does more exist than the finished modules and one unconverted tensor, or `PIECE_BYTES` of it where the
    module takes it in pieces.
    """
    dtype = model.dtype
    source = RandomTensors(seed, dtype)
    for name, meta in originals:
        make = source.borrowed if _copies(model, name) else source.like
        for start, piece in pieces(model, name, meta):
            give_weight(model, name, make(name, piece, device), start)
    _give_buffers(model, device)
    model.tie_weights(recompute_mapping=False)  # conversion may have taken tied parameters out of the mapping
    _check_complete(model)
    return model


def pieces(model: nn.Module, name: str, meta: torch.Tensor) -> list[tuple[int | None, torch.Tensor]]:
    """First index and meta tensor of each piece that `name` can be given in; (None, meta) when only as a whole.

    A module that takes pieces has `piece_length(name)`: along the first dimension, a piece starts at a multiple of it.
    """
    whole: list[tuple[int | None, torch.Tensor]] = [(None, meta)]
    taker = next((found for found in _owners(model, name) if hasattr(found[0], "load_weight")), None)
    if taker is None or not hasattr(taker[0], "piece_length") or meta.nbytes <= PIECE_BYTES:
        return whole
    length = taker[0].piece_length(taker[1])
    if length is None:
        return whole
    step = max(1, PIECE_BYTES // (meta[0].nbytes * length)) * length
    return [(start, meta[start : start + step]) for start in range(0, meta.shape[0], step)]


def give_weight(model: nn.Module, name: str, tensor: torch.Tensor, start: int | None = None) -> None:
    """Hand `tensor` (from index `start` on, if a piece) to the module that replaced the owner of `name`, or set it as
    the parameter itself."""
    for module, local_name in _owners(model, name):
        if hasattr(module, "load_weight"):
            if start is None:
                module.load_weight(local_name, tensor)
            else:
                module.load_piece(local_name, start, tensor)
            return
    module, local_name = next(_owners(model, name))
    module._parameters[local_name] = nn.Parameter(tensor)


def _copies(model: nn.Module, name: str) -> bool:
    """Whether the module that takes `name` promises (`keeps_input` false) not to hold on to the tensor."""
    return any(getattr(module, "keeps_input", True) is False for module, _ in _owners(model, name))


def _owners(model: nn.Module, name: str) -> Iterator[tuple[Any, str]]:
    """Modules on the path of `name` that exist, innermost first, with the rest of the name."""
    parts = name.split(".")
    chain: list[tuple[Any, str]] = [(model, name)]
    module: Any = model
    for position, part in enumerate(parts[:-1]):
        module = module._modules.get(part)
        if module is None:
            break
        chain.append((module, ".".join(parts[position + 1 :])))
    return iter(reversed(chain))


def _give_buffers(model: PreTrainedModel, device: str) -> None:
    """Buffers take their values from the model's own initialization (rotary frequencies among them)."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # initialize_weights() leaves it alone
    model.initialize_weights()


def _check_complete(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    if left:
        raise RuntimeError(f"these tensors were given no weights: {', '.join(left[:8])}")
