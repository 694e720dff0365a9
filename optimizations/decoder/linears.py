"""Matrices of a model as the native decoder takes them: packed or dense, their addresses and what keeps them alive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optimizations.errors import Refusal
from optimizations.native import lossless
from optimizations.native.loader import native
from optimizations.native.packing import Packed
from optimizations.weights.formats import Parts
from optimizations.weights.integer_format import IntegerFormat
from optimizations.weights.lossless_format import LosslessFormat
from optimizations.weights.packed_modules import PackedEmbedding, PackedExperts, PackedLinear, PackedModule

NativeFormat = IntegerFormat | LosslessFormat


class Matrices:
    """Turns modules into descriptors of `optimizations._native.decoder`; `tensors` must outlive them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.tensors: list[Tensor] = []

    def address(
        self, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> int:
        """The address of `tensor` after its shape, dtype and strides were checked.

        Raises:
            Refusal: it is not what the decoder reads.
        """
        wanted = dtype or self.dtype
        found = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
        if found != (shape, wanted, "cpu"):
            raise Refusal(f"{name} is {found[1]} {found[0]} on {found[2]}, expected {wanted} {shape} on cpu")
        if not tensor.is_contiguous():
            raise Refusal(f"{name} has strides {tensor.stride()}; the native decoder reads dense weights")
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def linear(self, name: str, module: Any, rows: int, cols: int) -> Any:
        """A linear layer of `rows` outputs and `cols` inputs; Refusal for a kind that has no native product."""
        if not isinstance(module, nn.Module):
            raise Refusal(f"{name} is missing")
        bias = module._parameters.get("bias")
        bias_address = 0 if bias is None else self.address(f"{name}.bias", bias.detach(), (rows,))
        if isinstance(module, PackedLinear) and module.kept_because is None:
            fmt = native_format(name, module, self.dtype)
            addresses = self._packed(module.parts("weight"), rows, cols, fmt)
            return native().decoder.Linear(*addresses, bias_address, rows, cols, *_kind(fmt))
        if not isinstance(module, PackedLinear) and type(module) is not nn.Linear:
            raise Refusal(
                f"{name} is a {type(module).__name__}; natively there are nn.Linear, int8, int4 and lossless weights"
            )
        weight = self.address(f"{name}.weight", module.get_parameter("weight").detach(), (rows, cols))
        return native().decoder.Linear(weight, 0, bias_address, rows, cols, 0, 0)

    def table(self, name: str, module: Any, rows: int, cols: int) -> Any:
        """An embedding of `rows` tokens, packed or dense; Refusal for others."""
        if isinstance(module, PackedEmbedding):
            return self.linear(name, module.table, rows, cols)
        if type(module) is not nn.Embedding or module.max_norm is not None:
            raise Refusal(
                f"{name} is a {type(module).__name__}; natively there are nn.Embedding, int8, int4 and lossless rows"
            )
        weight = self.address(f"{name}.weight", module.weight.detach(), (rows, cols))
        return native().decoder.Linear(weight, 0, 0, rows, cols, 0, 0)

    def _packed(self, parts: Parts, rows: int, cols: int, fmt: NativeFormat) -> list[int]:
        """Addresses of both parts of a packed matrix after they were checked."""
        if isinstance(fmt, LosslessFormat):
            whole = lossless.Lossless.wrap(parts["data"], parts["index"], rows, cols)
            tensors = [whole.data, whole.index]
        else:
            packed = Packed.wrap(parts["data"], parts["scales"], rows, cols, fmt.bits)
            tensors = [packed.data, packed.scales]
        self.tensors += tensors
        return [tensor.data_ptr() for tensor in tensors]

    def experts(self, name: str, module: Any, count: int, hidden: int, inner: int) -> Any:
        """The fused experts of a layer, packed or dense; Refusal for others."""
        kind: Any = native().decoder.Experts
        if isinstance(module, PackedExperts):
            fmt = native_format(name, module, self.dtype)
            tensors = [*module.parts("gate_up_proj").values(), *module.parts("down_proj").values()]
            self.tensors += tensors
            return kind(*(tensor.data_ptr() for tensor in tensors), count, inner, *_kind(fmt))
        if not {"gate_up_proj", "down_proj"} <= module._parameters.keys():
            raise Refusal(f"{name} is a {type(module).__name__} without fused expert weights")
        gate_up = self.address(
            f"{name}.gate_up_proj", module.gate_up_proj.detach(), (count, 2 * inner, hidden)
        )
        down = self.address(f"{name}.down_proj", module.down_proj.detach(), (count, hidden, inner))
        return kind(gate_up, 0, down, 0, count, inner, 0, 0)

    def norm(self, name: str, module: Any, width: int) -> Any:
        """An RMSNorm over `width` values."""
        weight = self.address(f"{name}.weight", module.weight.detach(), (width,))
        return native().decoder.Norm(weight, module.variance_epsilon)


def native_format(name: str, module: PackedModule, dtype: torch.dtype) -> NativeFormat:
    """The format of a packed module; Refusal for one without native products in `dtype`, or while its weights have not been loaded."""
    if not isinstance(module.format, IntegerFormat | LosslessFormat):
        raise Refusal(
            f"{name} is packed as {module.format}, which has no native product; use weight_int4, weight_int8 or "
            "weight_lossless"
        )
    if isinstance(module.format, LosslessFormat) and dtype != torch.bfloat16:
        raise Refusal(f"{name} holds bfloat16 weights in 12 bits, which multiply bfloat16 and not {dtype}")
    if module.pending:
        raise Refusal(f"{name} still waits for its weights ({', '.join(sorted(module.pending))})")
    return module.format


def _kind(fmt: NativeFormat) -> tuple[int, int]:
    """Bits and columns of a group, as `decoder.Linear` has them."""
    return (lossless.BITS, 0) if isinstance(fmt, LosslessFormat) else (fmt.bits, fmt.group_size)
