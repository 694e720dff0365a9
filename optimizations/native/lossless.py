"""bfloat16 weights in 12 bits without loss, and products from there with the bits that the dense weights give.

Sign and mantissa (8 bits) stay as they are. Of the 256 exponents a trained or random matrix uses few: sixteen, chosen for every
eight rows, cover all but one value in some thousands, and four bits say which. The others are listed with their places
(`index`). A matrix of other habits does not fit and is refused with its figures.

Up to six rows of x wait for memory and read a quarter less of it; more meet weights that were widened into the second-level
cache. Sources: the entropy of exponents is that of DFloat11 (arXiv 2504.11651) and NeuZip (arXiv 2410.20650); codes
of fixed length are wider than theirs by a bit and need no tables per value, which a CPU could not follow at the speed of memory.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from optimizations.native.checks import require_shape, require_tensor
from optimizations.native.loader import native

BITS = 12
ROWS = 8  # that share their exponents
_BLOCK, _BLOCK_BYTES = 128, 192  # columns; 64 bytes of exponent codes, 128 of signs and mantissas
_EXTRA_BYTES = 4


def lossless_shapes(rows: int, cols: int) -> tuple[tuple[int, int], tuple[int]]:
    """Shapes (uint8) of data and index of a weight [rows, cols]; kernels/lossless.h has the layout."""
    if rows < 1 or cols < 1:
        raise ValueError(f"a weight must have rows and columns, got {rows} x {cols}")
    panels, blocks = -(-rows // ROWS), -(-cols // _BLOCK)
    marks = -(-(16 + 4 + 2 * blocks) // 4) * 4
    return (panels * ROWS, blocks * _BLOCK_BYTES), (panels * marks + _EXTRA_BYTES * most_extras(rows, cols),)


def most_extras(rows: int, cols: int) -> int:
    """How many values of a weight [rows, cols] may have an exponent that is none of their eight rows' sixteen."""
    return rows * -(-cols // 256)


class TooManyExponents(ValueError):
    """A matrix with more exponents than 12 bits a value hold."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Lossless:
    """A bfloat16 weight [rows, cols] in 12 bits a value: two uint8 tensors and what they mean."""

    data: Tensor
    index: Tensor
    rows: int
    cols: int

    @classmethod
    def wrap(cls, data: Tensor, index: Tensor, rows: int, cols: int) -> Lossless:
        """A view of tensors that `pack_lossless` filled.

        Raises:
            TypeError, ValueError: dtype, shape, strides or alignment do not fit `rows` x `cols`.
        """
        data_shape, index_shape = lossless_shapes(rows, cols)
        require_tensor("lossless weight", "data", data, torch.uint8, data_shape, 64)
        require_tensor("lossless weight", "index", index, torch.uint8, index_shape, 4)
        return cls(data, index, rows, cols)

    @property
    def nbytes(self) -> int:
        """Bytes of data and index."""
        return self.data.nbytes + self.index.nbytes


def pack_lossless(weight: Tensor) -> Lossless:
    """`weight` [rows, cols], bfloat16, in 12 bits a value; see `pack_lossless_into` for what it raises."""
    require_shape("pack_lossless", "weight", weight, (-1, -1))
    data, index = lossless_shapes(*weight.shape)
    packed = Lossless(
        torch.empty(data, dtype=torch.uint8), torch.empty(index, dtype=torch.uint8), *weight.shape
    )
    pack_lossless_into(weight, packed)
    return packed


def pack_lossless_into(weight: Tensor, packed: Lossless) -> None:
    """Packs `weight` [rows, cols] into existing memory, on all of torch's threads.

    Raises:
        TypeError, ValueError: the weight is not bfloat16, has another shape, or is not dense in host memory.
        TooManyExponents: too many of its values have exponents that are not among the sixteen of their rows.
    """
    require_tensor("pack_lossless", "weight", weight, torch.bfloat16, (packed.rows, packed.cols))
    extras = native().pack_lossless(
        weight.data_ptr(),
        packed.rows,
        packed.cols,
        packed.data.data_ptr(),
        packed.index.data_ptr(),
        torch.get_num_threads(),
    )
    most = most_extras(packed.rows, packed.cols)
    if extras > most:
        raise TooManyExponents(
            f"a matrix of {packed.rows} x {packed.cols} has {extras} values whose exponent is none of the sixteen that "
            f"their eight rows have most often, and 12 bits a value leave room for {most}"
        )


def expand_lossless(packed: Lossless, indices: Tensor | None = None) -> Tensor:
    """The weight as it was, bfloat16 [rows, cols], or its rows `indices` (int64, any shape): [*indices.shape, cols].

    Raises:
        TypeError: indices are not int64.
        ValueError: an index outside 0 .. rows - 1, or indices not dense in host memory.
    """
    if indices is None:
        out, address, count = torch.empty((packed.rows, packed.cols), dtype=torch.bfloat16), 0, packed.rows
    else:
        require_tensor("expand_lossless", "indices", indices, torch.int64, (-1,) * indices.dim())
        out = torch.empty((*indices.shape, packed.cols), dtype=torch.bfloat16)
        address, count = indices.data_ptr(), indices.numel()
    if count:
        native().expand_lossless(
            packed.data.data_ptr(),
            packed.index.data_ptr(),
            packed.rows,
            packed.cols,
            address,
            count,
            out.data_ptr(),
            torch.get_num_threads(),
        )
    return out


def lossless_linear(x: Tensor, weight: Lossless, bias: Tensor | None = None) -> Tensor:
    """x [..., cols] @ weight^T + bias [rows] -> [..., rows], all bfloat16, with the bits of `dense_linear`. No gradient.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit, or a tensor is not dense in host memory.
        NativeModuleMissing: the kernels are not built.
    """
    require_tensor("lossless_linear", "x", x, torch.bfloat16, (*(-1,) * (x.dim() - 1), weight.cols))
    if bias is not None:
        require_tensor("lossless_linear", "bias", bias, torch.bfloat16, (weight.rows,))
    out = x.new_empty((*x.shape[:-1], weight.rows))
    targets = [weight.data.data_ptr(), weight.index.data_ptr(), 0 if bias is None else bias.data_ptr()]
    native().lossless_linear(
        x.data_ptr(),
        x.numel() // weight.cols,
        weight.cols,
        [*targets, out.data_ptr(), weight.rows],
        torch.get_num_threads(),
    )
    return out


def lossless_moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    inner: int,
) -> Tensor:
    """`dense_moe` over experts in 12 bits, with its bits. No gradient.

    x [tokens, hidden] bfloat16; experts [tokens, k] int64; weights [tokens, k] float32 or bfloat16; gate_up, down: data and
    index of all experts, [experts, ...], each expert's [2 * inner, hidden] and [hidden, inner] packed as a whole.

    Raises: as `lossless_linear`, and ValueError when an expert's number does not exist.
    """
    require_tensor("lossless_moe", "x", x, torch.bfloat16, (-1, -1))
    hidden, count = x.shape[1], gate_up[0].shape[0]
    for name, (data, index), rows, cols in (
        ("gate_up", gate_up, 2 * inner, hidden),
        ("down", down, hidden, inner),
    ):
        data_shape, index_shape = lossless_shapes(rows, cols)
        require_tensor("lossless_moe", f"{name} data", data, torch.uint8, (count, *data_shape), 64)
        require_tensor("lossless_moe", f"{name} index", index, torch.uint8, (count, *index_shape), 4)
    require_tensor("lossless_moe", "experts", experts, torch.int64, (x.shape[0], -1))
    require_shape("lossless_moe", "weights", weights, tuple(experts.shape))
    weights = weights.float().contiguous()
    out = torch.empty_like(x)
    native().lossless_moe(
        x.data_ptr(),
        x.shape[0],
        hidden,
        inner,
        experts.data_ptr(),
        weights.data_ptr(),
        experts.shape[1],
        count,
        *(tensor.data_ptr() for tensor in (*gate_up, *down)),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
