"""weight_nf4: NormalFloat 4-bit weights through bitsandbytes."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, ClassVar

from optimizations.contract import AccuracyBudget, Fidelity, Kind, Target
from optimizations.errors import InvalidSpec
from optimizations.weights.formats import WeightFormat
from optimizations.weights.nf4_format import Nf4Format
from optimizations.weights.settings import require_flag
from optimizations.weights.technique import WeightQuantization

BLOCK_SIZES = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class WeightNf4(WeightQuantization):
    """Weights as 4-bit NormalFloat, whose 16 levels are quantiles of a normal distribution, through bitsandbytes.

    One scale per `block_size` weights. On CPUs with AVX512-BF16 bitsandbytes' fused kernel multiplies from the
    packed form (4.25 bits a weight at block 64); elsewhere, and with `double_quant` (scales in 8 bits, 4.13 bits),
    every call dequantizes the whole matrix first, which is slower than bf16: then this saves memory, not time.
    Fused experts, which bitsandbytes itself skips, are packed too and run expert by expert from Python. What is
    packed and what is kept is as in `weight_int4`.

    Source: QLoRA (Dettmers et al., arXiv 2305.14314); bitsandbytes' quantization and CPU kernels.
    """

    name: ClassVar[str] = "weight_nf4"
    kind: ClassVar[Kind] = Kind.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    summary: ClassVar[str] = "4-bit NormalFloat weights incl. experts and output head, through bitsandbytes"
    source: ClassVar[str] = "QLoRA arXiv:2305.14314, bitsandbytes"
    # Measured on the trained dense reference, 4,096 tokens of library source: KL 0.057 nats, top-1 0.844, perplexity
    # x 1.075 at block 64; 0.099, 0.796, x 1.130 at block 256. The budget covers every block size.
    budget: ClassVar[AccuracyBudget] = AccuracyBudget(0.15, 0.75, 1.18, 0.15)
    conflicts: ClassVar[dict[str, str]] = {
        "weight_int4": "a weight is stored in one format",
        "weight_int8": "a weight is stored in one format",
    }

    block_size: int = 64
    double_quant: bool = False
    include_lm_head: bool = True
    quantize_embedding: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.block_size, bool) or self.block_size not in BLOCK_SIZES:
            offered = ", ".join(map(str, BLOCK_SIZES))
            raise InvalidSpec(f"{self.name}: block_size must be one of {offered}, got {self.block_size!r}")
        for setting in ("double_quant", "include_lm_head", "quantize_embedding"):
            require_flag(self.name, setting, getattr(self, setting))

    def refusal(self, target: Target) -> str | None:
        if importlib.util.find_spec("bitsandbytes") is None:
            return "bitsandbytes is not installed; pip install bitsandbytes"
        return super().refusal(target)

    def weight_format(self) -> WeightFormat:
        return Nf4Format(self.block_size, self.double_quant)

    @property
    def packs_head(self) -> bool:
        return self.include_lm_head

    @property
    def packs_embedding(self) -> bool:
        return self.quantize_embedding

    @classmethod
    def search_space(cls) -> dict[str, Sequence[Any]]:
        return {"block_size": BLOCK_SIZES, "double_quant": (False, True)}
