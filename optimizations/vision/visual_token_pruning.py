"""Fewer visual tokens in the text tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from optimizations.contract import AccuracyBudget, Fidelity, Kind, Optimization, Target, Undo
from optimizations.errors import InvalidSpec
from optimizations.vision.pruned_prefill import PrunedTextTower
from optimizations.vision.token_selection import METHODS

if TYPE_CHECKING:
    from optimizations.runner import Runner


@dataclasses.dataclass(frozen=True)
class VisualTokenPruning(Optimization):
    """Keeps a fraction of each image's tokens after the vision merger, so prefill and the cache are shorter.

    The survivors are a diverse subset of the merged features: greedy MAP of a determinantal point process with
    a linear kernel (`method=volume`; Chen et al., NeurIPS 2018; used for visual tokens by CDPruner,
    arXiv 2506.10967), so duplicates go first and no attention weights are needed (FastV, arXiv 2403.06764, needs
    them and with them eager attention). `farthest` is k-center greedy; `uniform` keeps every n-th token and is
    the control a criterion must beat (arXiv 2502.11501). The same columns leave the DeepStack features and the
    visual mask; survivors keep their 3-D M-RoPE ids, and later tokens the positions they had after the full
    image. Rows of a batch are packed and padded on the left anew, so different images per row work.

    The vision tower still runs in full. Callers see the full length: logits of a dropped visual position repeat
    those of its nearest survivor and mean nothing; compare answers on text positions. Inputs without images
    are computed exactly as before.

    Source: greedy MAP inference of a determinantal point process (Chen et al., NeurIPS 2018), on visual tokens
    CDPruner (2506.10967).
    """

    name: ClassVar[str] = "visual_token_pruning"
    kind: ClassVar[Kind] = Kind.VISION
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    summary: ClassVar[str] = "keeps a diverse subset of each image's tokens: shorter prefill and cache"
    source: ClassVar[str] = "greedy MAP of a DPP (Chen et al., NeurIPS 2018); CDPruner (arXiv 2506.10967)"
    budget: ClassVar[AccuracyBudget] = AccuracyBudget(0.1, 0.85, 1.1, 0.05)
    differentiable: ClassVar[bool] = True

    keep_ratio: float = 0.5
    method: str = "volume"

    def __post_init__(self) -> None:
        if isinstance(self.keep_ratio, bool) or not isinstance(self.keep_ratio, int | float):
            raise InvalidSpec(f"{self.name}: keep_ratio must be a number, got {self.keep_ratio!r}")
        if not 0.0 < self.keep_ratio <= 1.0:
            raise InvalidSpec(f"{self.name}: keep_ratio must be in (0, 1], got {self.keep_ratio}")
        if self.method not in METHODS:
            raise InvalidSpec(f"{self.name}: method must be one of {', '.join(METHODS)}, got {self.method!r}")

    def refusal(self, target: Target) -> str | None:
        if getattr(target.config, "vision_config", None) is None:
            return f"{target.model_type} reads text only, so there are no visual tokens to prune"
        if target.model_type != "qwen3_vl":
            return f"the layout of {target.model_type}'s visual tokens is not known here, only qwen3_vl's"
        return None

    def kept_tokens(self, tokens: int) -> int:
        """How many of an image's `tokens` stay: at least one."""
        return max(1, round(self.keep_ratio * tokens))

    def select(self, features: torch.Tensor) -> torch.Tensor:
        """Kept indices, int64 ascending, of one image's merged features [n, H]."""
        return METHODS[self.method](features.detach(), self.kept_tokens(len(features)))

    def apply(self, runner: Runner) -> Undo:
        model: Any = runner.model.model
        tower = PrunedTextTower(model, self.select)
        before = {
            owner: owner.__dict__.get(name)
            for owner, name in ((model, "compute_3d_position_ids"), (model.language_model, "forward"))
        }
        model.compute_3d_position_ids = tower.positions
        model.language_model.forward = tower.forward

        def undo() -> None:
            _restore(model, "compute_3d_position_ids", before[model])
            _restore(model.language_model, "forward", before[model.language_model])

        return undo

    @classmethod
    def search_space(cls) -> dict[str, Sequence[Any]]:
        return {"keep_ratio": (0.75, 0.5, 0.25), "method": tuple(METHODS)}


def _restore(owner: Any, name: str, value: Any) -> None:
    """Give `owner` back the instance attribute it had, or none."""
    if value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
