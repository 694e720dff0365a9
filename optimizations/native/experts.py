"""The packed experts of a mixture-of-experts layer."""

from __future__ import annotations

import dataclasses

import torch

from optimizations.native.checks import require_shape, require_tensor
from optimizations.native.packing import LANES, Packed, pack_into, packed_shapes


def _layout(
    hidden: int, inner: int, bits: int, group_size: int
) -> list[tuple[tuple[int, ...], torch.dtype, int]]:
    """Shape of one expert, dtype and alignment of the four tensors."""
    padded = -(-inner // LANES) * LANES
    gate_up = packed_shapes(2 * padded, hidden, bits, group_size)
    down = packed_shapes(hidden, inner, bits, group_size)
    kinds = ((torch.uint8, 64), (torch.bfloat16, 32))
    return [(shape, *kind) for pair in (gate_up, down) for shape, kind in zip(pair, kinds, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class PackedExperts:
    """Packed experts of one layer: gate and up [inner, hidden] and down [hidden, inner] of each.

    `gate_up_data` uint8 [experts, 2 * gate panels, groups, bytes]: the panels of gate, then those of up. `down_data` uint8
    [experts, panels, groups, bytes]. Scales likewise, bfloat16, [..., 16].
    """

    gate_up_data: torch.Tensor
    gate_up_scales: torch.Tensor
    down_data: torch.Tensor
    down_scales: torch.Tensor
    hidden: int
    inner: int
    bits: int
    group_size: int

    @classmethod
    def empty(
        cls, experts: int, hidden: int, inner: int, *, bits: int, group_size: int = 32
    ) -> PackedExperts:
        """Memory for a layer's experts, not initialized; fill it with `pack_into` of gate(e), up(e), down(e)."""
        layout = _layout(hidden, inner, bits, group_size)
        gate_up, gate_up_scales, down, down_scales = (
            torch.empty((experts, *shape), dtype=dtype) for shape, dtype, _ in layout
        )
        return cls(gate_up, gate_up_scales, down, down_scales, hidden, inner, bits, group_size)

    @classmethod
    def wrap(
        cls,
        gate_up_data: torch.Tensor,
        gate_up_scales: torch.Tensor,
        down_data: torch.Tensor,
        down_scales: torch.Tensor,
        hidden: int,
        inner: int,
        bits: int,
        group_size: int,
    ) -> PackedExperts:
        """A view of tensors made by `pack_experts`, for instance read back from a file.

        Raises:
            TypeError, ValueError: dtype, shape, strides or alignment do not fit.
        """
        experts = down_data.shape[0] if down_data.dim() else 0
        layout = _layout(hidden, inner, bits, group_size)
        given = (gate_up_data, gate_up_scales, down_data, down_scales)
        names = ("gate_up_data", "gate_up_scales", "down_data", "down_scales")
        for name, tensor, (shape, dtype, alignment) in zip(names, given, layout, strict=True):
            require_tensor("packed experts", name, tensor, dtype, (experts, *shape), alignment)
        return cls(*given, hidden, inner, bits, group_size)

    @property
    def experts(self) -> int:
        return self.gate_up_data.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all four tensors."""
        tensors = (self.gate_up_data, self.gate_up_scales, self.down_data, self.down_scales)
        return sum(tensor.nbytes for tensor in tensors)

    def gate(self, expert: int) -> Packed:
        """Expert's gate projection [inner, hidden], a view."""
        return self._half(expert, slice(None, self.gate_up_data.shape[1] // 2))

    def up(self, expert: int) -> Packed:
        """Expert's up projection [inner, hidden], a view."""
        return self._half(expert, slice(self.gate_up_data.shape[1] // 2, None))

    def down(self, expert: int) -> Packed:
        """Expert's down projection [hidden, inner], a view."""
        data, scales = self.down_data[expert], self.down_scales[expert]
        return Packed(data, scales, self.hidden, self.inner, self.bits, self.group_size)

    def _half(self, expert: int, panels: slice) -> Packed:
        data, scales = self.gate_up_data[expert, panels], self.gate_up_scales[expert, panels]
        return Packed(data, scales, self.inner, self.hidden, self.bits, self.group_size)


def pack_experts(
    gate_up: torch.Tensor, down: torch.Tensor, *, bits: int, group_size: int = 32
) -> PackedExperts:
    """Fused expert weights as transformers stores them: gate_up [experts, 2 * inner, hidden], down [experts, hidden, inner]."""
    experts, hidden, inner = down.shape
    require_shape("pack", "gate_up", gate_up, (experts, 2 * inner, hidden))
    packed = PackedExperts.empty(experts, hidden, inner, bits=bits, group_size=group_size)
    for e in range(experts):
        pack_into(gate_up[e, :inner], packed.gate(e))
        pack_into(gate_up[e, inner:], packed.up(e))
        pack_into(down[e], packed.down(e))
    return packed
