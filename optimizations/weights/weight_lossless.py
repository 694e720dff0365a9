"""weight_lossless: bfloat16 weights in 12 bits, every bit of them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from optimizations.contract import AccuracyBudget, Fidelity, Kind, Target
from optimizations.weights.formats import WeightFormat
from optimizations.weights.lossless_format import LosslessFormat
from optimizations.weights.technique import WeightQuantization

ONE_FORMAT = "a weight is stored in one format"


@dataclasses.dataclass(frozen=True)
class WeightLossless(WeightQuantization):
    """bfloat16 weights in 12 bits without loss: linear layers, output head, embedding and fused experts.

    Sign and mantissa stay; the exponent becomes four bits, which choose one of the sixteen that eight rows have most often.
    Values with another exponent (one in some 13,000 of normal weights) are listed and put in when they are read. Memory is
    0.76 of bf16's; a token, which waits for memory, reads three quarters of the bytes and takes up to 1.33 times less.
    More than six rows at once meet weights widened into the second-level cache and take as long as over dense ones.

    The weights that are multiplied are the model's own, bit for bit; sums are taken by our kernels, in an order other than
    torch's. Under `native_decoder` answers have the bits that it gives without this. Matrices of other habits (more than one
    value in 256 outside of the sixteen, as where training let channels fade away) stay dense, with their figures as the
    reason; experts among them are refused.

    Source: the entropy of bfloat16 exponents, DFloat11 (arXiv 2504.11651) and NeuZip (arXiv 2410.20650); four bits in place
    of a Huffman code, which a CPU does not decode at the speed of its memory.
    """

    name: ClassVar[str] = "weight_lossless"
    kind: ClassVar[Kind] = Kind.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING
    summary: ClassVar[str] = "bf16 weights in 12 bits, bit for bit the same weights, own kernels"
    source: ClassVar[str] = "DFloat11 arXiv:2504.11651, NeuZip arXiv:2410.20650"
    # The budget of native_decoder, whose dense kernels add up in the same order.
    budget: ClassVar[AccuracyBudget] = AccuracyBudget(0.01, 0.97, 1.01, 0.02)
    conflicts: ClassVar[dict[str, str]] = {
        "weight_int4": ONE_FORMAT,
        "weight_int8": ONE_FORMAT,
        "weight_nf4": ONE_FORMAT,
    }

    def refusal(self, target: Target) -> str | None:
        reason = super().refusal(target)
        if reason is None and target.dtype != "bfloat16":
            return f"it holds bfloat16 weights bit for bit, and the model is in {target.dtype}; use --pio-dtype=bfloat16"
        return reason

    def weight_format(self) -> WeightFormat:
        return LosslessFormat()

    @property
    def packs_head(self) -> bool:
        return True

    @property
    def packs_embedding(self) -> bool:
        return True
