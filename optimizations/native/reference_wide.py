"""What many bf16 rows over int4 weights are multiplied as, in plain torch: kernels/wide_bytes.h on AMX, wide_integers.h on AVX-512.

Weights become int8 with one scale per row and 512 columns, and so do rows of x. On AMX a row with values far above the others keeps
15 bits, so that none is rounded more coarsely than int8 in groups of 32 may round it; on AVX-512 up to eight values of the 512 are
integers beyond an int8, so that they do not coarsen the others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from optimizations.native.packing import Packed
from optimizations.native.reference import levels

BLOCK = 512
COARSE_SQUARE = 32.0
FINE_UNITS = 254.0
STEP_LEVELS, LEAST_LEVEL = 64, 8
MOST_HIGH = 8
LEVELS = torch.tensor(127.0)  # a tensor, as torch divides a number by one through its reciprocal
UNIT = torch.tensor(8.0) / LEVELS


def byte_weights(packed: Packed) -> Tensor:
    """An int4 weight as bytes times what one counts, float64 [rows, cols]."""
    q, scales = levels(packed)  # [rows, groups, group], [rows, groups]
    per_block = BLOCK // packed.group_size
    missing = -scales.shape[1] % per_block
    s = functional.pad(scales.float(), (0, missing)).unflatten(1, (-1, per_block))
    most = s.abs().amax(-1, keepdim=True)
    up = torch.where(most < 2.0**-90, 2.0**60, 1.0)
    inverse = torch.where(most > 0, torch.tensor(127.0 / 8 * 2048) / (most * up), 0.0)
    factor = torch.round((s * up) * inverse).double()
    tall = functional.pad(q.double(), (0, 0, 0, missing)).unflatten(1, (-1, per_block))
    bytes_ = torch.floor((tall * 16 * factor.unsqueeze(-1) + 2**14) / 2**15)
    values = bytes_ * (most * UNIT).double().unsqueeze(-1)
    return values.flatten(1)[: packed.rows, : packed.cols]


def byte_rows(x: Tensor) -> Tensor:
    """Rows of x [..., cols] as one or two int8 times their scale, float64: on AMX."""
    blocks = [_byte_block(block.float()) for block in x.split(BLOCK, dim=-1)]
    return torch.cat(blocks, dim=-1)


def integer_rows(x: Tensor) -> Tensor:
    """Rows of x [..., cols] as integers times their step, float64: on AVX-512."""
    blocks = [_integer_block(block.float()) for block in x.split(BLOCK, dim=-1)]
    return torch.cat(blocks, dim=-1)


def _byte_block(x: Tensor) -> Tensor:
    most = x.abs().amax(-1, keepdim=True)
    usable = most > 1e-36
    y = torch.where(usable, x * (LEVELS / most), 0.0)
    whole = torch.round(y)
    fine = usable & (127.0**2 * x.shape[-1] > COARSE_SQUARE * y.square().sum(-1, keepdim=True))
    rest = torch.where(fine, torch.round((y - whole) * FINE_UNITS), 0.0)
    return (whole.double() + rest.double() / FINE_UNITS) * (most / 127.0).double()


def _integer_block(x: Tensor) -> Tensor:
    bits = x.bfloat16().view(torch.int16).int() & 0x7FFF
    most = bits.amax(-1, keepdim=True)
    # Candidates lie 16 of an octave's 128 bit patterns apart; the least that few values are above is what an int8 reaches.
    levels = torch.arange(STEP_LEVELS) * 16
    above = (bits.unsqueeze(-2) > (most - levels).unsqueeze(-1)).sum(-1)
    level = ((above <= MOST_HIGH) * torch.arange(STEP_LEVELS)).amax(-1, keepdim=True)
    level = torch.where(level < LEAST_LEVEL, 0, level)
    largest = most.to(torch.int16).view(torch.bfloat16).float()
    level = torch.where(largest < 1e-30, 0, level)
    reach = (most - level * 16).to(torch.int16).view(torch.bfloat16).float()
    whole = torch.where(largest > 1e-36, torch.round(x * (LEVELS / reach)), 0.0)
    return whole.double() * (reach / LEVELS).double()
