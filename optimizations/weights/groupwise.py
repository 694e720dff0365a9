"""What `weight_int4` and `weight_int8` share: their settings, over groupwise integers of some number of bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from optimizations.weights.settings import require_flag, require_group_size
from optimizations.weights.technique import WeightQuantization


@dataclasses.dataclass(frozen=True)
class GroupwiseIntegers(WeightQuantization):
    """Weights as integers with one bf16 scale per row and `group_size` columns; a subclass names the bits."""

    group_size: int = 32
    include_lm_head: bool = True
    quantize_embedding: bool = False

    def __post_init__(self) -> None:
        require_group_size(self.name, self.group_size)
        require_flag(self.name, "include_lm_head", self.include_lm_head)
        require_flag(self.name, "quantize_embedding", self.quantize_embedding)

    @property
    def packs_head(self) -> bool:
        return self.include_lm_head

    @property
    def packs_embedding(self) -> bool:
        return self.quantize_embedding

    @classmethod
    def search_space(cls) -> dict[str, Sequence[Any]]:
        return {"group_size": (32, 64, 128), "include_lm_head": (True, False)}
