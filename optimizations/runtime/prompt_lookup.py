"""Speculative decoding whose draft is copied from the text so far."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from transformers.generation.candidate_generator import CandidateGenerator

from optimizations.contract import ROUNDING_BUDGET, AccuracyBudget, Fidelity, Kind, Optimization, Target, Undo
from optimizations.errors import InvalidSpec
from optimizations.repeatable import is_repeatable
from optimizations.runner import Runner
from optimizations.runtime.draft_length import DraftLength
from optimizations.runtime.ngram_index import NgramIndex

logger = logging.getLogger(__name__)

STATE = "_prompt_lookup_counts"


@dataclasses.dataclass
class Counts:
    """What speculation did since it was applied."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    plain_calls: int = 0  # generate() calls that could not be assisted

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one forward pass produced on average (1 without any accepted draft)."""
        return 1.0 + self.accepted / self.steps if self.steps else 1.0


class LookupCandidates(CandidateGenerator):
    """Drafts from an n-gram index and learns its draft length from time and acceptance.

    Only sequences of shape [1, length] occur: transformers' assisted decoding takes one sequence.
    """

    def __init__(self, index: NgramIndex, length: DraftLength, max_length: int, counts: Counts) -> None:
        self.index = index
        self.length = length
        self.max_length = max_length
        self.counts = counts
        self._drafted = 0
        self._started: float | None = None
        self._first = True

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """`input_ids` int64 [1, length] with the draft appended, and no draft logits."""
        self.index.extend(input_ids[0, len(self.index.tokens) :].tolist())
        # The target adds one token of its own, so a draft may fill all but the last place.
        room = self.max_length - input_ids.shape[1] - 1
        # Without a draft the first forward is the plain prefill, whose time says nothing about a step.
        wanted = 0 if self._first else min(self.length.choose(), room)
        draft = self.index.continuation(wanted) if wanted > 0 else []
        self._drafted = len(draft)
        self._started = time.perf_counter()
        if not draft:
            return input_ids, None
        tail = torch.tensor([draft], dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat((input_ids, tail), dim=1), None

    def update_candidate_strategy(
        self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int
    ) -> None:
        assert self._started is not None, "update before any candidates"
        timeless = self._first or is_repeatable()
        seconds = None if timeless else time.perf_counter() - self._started
        self._first = False
        self.length.observe(self._drafted, int(num_matches), seconds)
        self.counts.steps += 1
        self.counts.drafted += self._drafted
        self.counts.accepted += int(num_matches)


@dataclasses.dataclass(frozen=True)
class PromptLookup(Optimization):
    """Speculative decoding without a draft model: the draft is what followed the current n-gram earlier.

    A suffix of the sequence is looked up in an incremental n-gram index, its continuation is verified in one
    forward pass, and the matching prefix is kept, so greedy output is the model's own and sampling keeps its
    distribution. The draft length follows measured acceptance and verification time: text that does not
    repeat costs one dictionary lookup per token; where answers are compared (`repeatable`), time is left out. Batches, beams and static caches run unassisted.

    Tokens are those of plain greedy decoding up to ties: a forward over several positions sums bf16 products
    in another order than one over a single position, and a tie within that rounding may fall the other way.

    Source: prompt lookup decoding (Saxena 2023, apoorvumang/prompt-lookup-decoding); speculative decoding
    (Leviathan et al. 2023, 2211.17192).
    """

    name: ClassVar[str] = "prompt_lookup"
    kind: ClassVar[Kind] = Kind.RUNTIME
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING
    summary: ClassVar[str] = "speculative decoding from the text so far, draft length adapted to its cost"
    source: ClassVar[str] = "prompt lookup decoding (Saxena 2023); Leviathan et al. 2023, 2211.17192"
    budget: ClassVar[AccuracyBudget] = ROUNDING_BUDGET
    conflicts: ClassVar[dict[str, str]] = {
        "torch_compile": "it fixes one token per step in a static cache, speculation verifies several"
    }

    max_draft: int = 10
    max_ngram: int = 3
    min_ngram: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.max_draft <= 64:
            raise InvalidSpec(f"prompt_lookup: max_draft must be 1 to 64 tokens, got {self.max_draft}")
        if not 1 <= self.min_ngram <= self.max_ngram <= 8:
            raise InvalidSpec(
                "prompt_lookup: need 1 <= min_ngram <= max_ngram <= 8, "
                f"got min_ngram={self.min_ngram}, max_ngram={self.max_ngram}"
            )

    @classmethod
    def search_space(cls) -> dict[str, Sequence[int]]:
        return {"max_draft": (4, 10, 16), "min_ngram": (1, 2), "max_ngram": (2, 3, 4)}

    def refusal(self, target: Target) -> str | None:
        return None

    def apply(self, runner: Runner) -> Undo:
        model, counts = runner.model, Counts()
        generate, candidates = model.generate, model._get_candidate_generator

        def assisted(*args: Any, **kwargs: Any) -> Any:
            reason = unassisted_reason(model, args, kwargs)
            if reason is None:
                kwargs["prompt_lookup_num_tokens"] = self.max_draft
            else:
                counts.plain_calls += 1
                _say_once(reason)
            return generate(*args, **kwargs)

        def candidate_generator(generation_config: Any, **kwargs: Any) -> Any:
            if generation_config.prompt_lookup_num_tokens is None:
                return candidates(generation_config=generation_config, **kwargs)
            index = NgramIndex(self.max_ngram, self.min_ngram)
            return LookupCandidates(index, DraftLength(self.max_draft), generation_config.max_length, counts)

        overrides = {"generate": assisted, "_get_candidate_generator": candidate_generator, STATE: counts}
        return override_attributes(model, overrides)

    def remarks(self, runner: Runner) -> Sequence[str]:
        counts: Counts = getattr(runner.model, STATE)
        drafts = f"{counts.accepted} of {counts.drafted} drafted tokens accepted"
        return [f"{drafts}, {counts.tokens_per_step:.2f} tokens per step"]


def unassisted_reason(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Why this `generate` call cannot be assisted, or None."""
    config = kwargs.get("generation_config") or model.generation_config
    inputs = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))

    def setting(name: str) -> Any:
        return kwargs.get(name, getattr(config, name, None))

    if inputs is None or inputs.shape[0] != 1:
        return "assisted decoding takes one sequence; a batch runs unassisted"
    if (setting("num_beams") or 1) > 1 or (setting("num_return_sequences") or 1) > 1:
        return "beams and several returned sequences run unassisted"
    if setting("use_cache") is False or setting("cache_implementation") is not None:
        return "speculation needs a dynamic cache that can be cropped"
    if kwargs.get("assistant_model") is not None or kwargs.get("custom_generate") is not None:
        return "the caller brought a decoding strategy of its own"
    return None


def override_attributes(model: Any, overrides: dict[str, Any]) -> Callable[[], None]:
    """Set instance attributes that shadow the class's; the returned callable restores what was there."""
    own = {name: model.__dict__[name] for name in overrides if name in model.__dict__}
    model.__dict__.update(overrides)

    def undo() -> None:
        for name in overrides:
            del model.__dict__[name]
        model.__dict__.update(own)

    return undo


_said: set[str] = set()


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.info("prompt_lookup: %s", reason)
