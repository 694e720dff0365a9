"""How much each category measures: counts in one place, so that a cell's time can be planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pytest_inferencepio.errors import UnknownName

# Below these there is nothing to measure: an image prompt is a quarter text, a rate needs two tokens, and the decoded
# tokens are shared between a text and an image.
_LEAST = {
    **dict.fromkeys(("warmup", "task_distance"), 0),
    **dict.fromkeys(("pairs", "most_pairs", "suspect_pairs", "batch_pairs", "requests"), 1),
    **dict.fromkeys(("longest_tokens", "generations", "generation_tokens", "task_examples", "processes"), 1),
    **dict.fromkeys(("new_tokens", "request_new_tokens", "window", "decoded_tokens"), 2),
    "prompt_tokens": 4,
    "image_size": 32,  # one merged patch of the largest published patch size
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Counts for one cell of the matrix. `seconds` is what a category is meant to take, not a limit.

    `image_size` is the side in pixels of the drawing that a model which takes images sees before its text. `pairs` is
    the number of before/after pairs, `most_pairs` where noise asks for more, `suspect_pairs` where the baseline says
    that something got slower, and where noise asks for more of what becomes a baseline. `load` is the arrival rate of
    requests, `objective_*` the latency objective of goodput, all as multiples of what the unoptimized model does with
    one request alone, so that they mean the same on every machine.

    Raises:
        TypeError, ValueError: what is no number, or a count with which nothing would be measured, by its field's name.
    """

    seconds: float
    warmup: int
    pairs: int
    most_pairs: int
    suspect_pairs: int
    prompt_tokens: int
    image_size: int
    new_tokens: int
    batch_sizes: tuple[int, ...]
    batch_pairs: int
    requests: int
    request_new_tokens: int
    load: float
    objective_ttft: float
    objective_tpot: float
    heldout_tokens: int
    window: int
    decoded_tokens: int
    longest_tokens: int
    generations: int
    generation_tokens: int
    task_examples: int
    task_distance: int
    processes: int
    energy_seconds: float

    def __post_init__(self) -> None:
        for name, least in {**_LEAST, "heldout_tokens": self.window}.items():
            count = getattr(self, name)
            if not isinstance(count, int | float):
                raise TypeError(f"{name} must be a number, got {count!r}")
            if count < least:
                what = f"{least}, one window" if name == "heldout_tokens" else str(least)
                raise ValueError(f"{name} must be at least {what}, got {count}")

    def changed(self, counts: Mapping[str, Any]) -> Budget:
        """With `counts` by field name; whoever names `pairs` gets so many, unless the other two are named too."""
        exact = dict.fromkeys(("most_pairs", "suspect_pairs"), counts["pairs"]) if "pairs" in counts else {}
        return dataclasses.replace(self, **{**exact, **counts})

    def scaled(self, seconds: float) -> Budget:
        """The same plan for another number of seconds per category: more or fewer repetitions.

        What is asked of the model stays (lengths, texts, examples), or records would not be comparable;
        pairs never fall below 5, the least that gives a 95 % one-sided bound.
        """
        if seconds <= 0:
            raise ValueError(f"a time budget must be positive, got {seconds} s")
        factor = seconds / self.seconds
        return dataclasses.replace(
            self,
            seconds=seconds,
            pairs=_times(self.pairs, factor, 5),
            most_pairs=_times(self.most_pairs, factor, 5),
            suspect_pairs=_times(self.suspect_pairs, factor, 5),
            batch_pairs=_times(self.batch_pairs, factor, 1),
            requests=_times(self.requests, factor, 4),
            processes=_times(self.processes, min(factor, 3.0), 1),
            energy_seconds=self.energy_seconds * factor,
        )


def _times(count: int, factor: float, least: int) -> int:
    return max(min(count, least), round(count * factor))


# Tiny: a few milliseconds a token on a slow core; full: up to seconds a token on a CPU. Few tokens and many pairs: shared
# cores change their speed within tenths of a second, so in the same time pairs of 4 tokens (0.1 s) told decoding's ratio
# to 1.7-3 %, pairs of 12 tokens to 2.7-6 %, and the first token's to 2.2 against 4-6 %.
PRESETS: dict[str, Budget] = {
    "tiny": Budget(
        seconds=2.0,
        warmup=2,
        pairs=12,
        most_pairs=18,
        suspect_pairs=48,
        prompt_tokens=128,
        image_size=128,
        new_tokens=6,
        batch_sizes=(1, 4),
        batch_pairs=3,
        requests=6,
        request_new_tokens=8,
        load=2.0,
        objective_ttft=8.0,
        objective_tpot=3.0,
        heldout_tokens=1024,
        window=512,
        decoded_tokens=64,
        longest_tokens=1024,
        generations=2,
        generation_tokens=16,
        task_examples=12,
        task_distance=512,
        processes=2,
        energy_seconds=1.0,
    ),
    "full": Budget(
        seconds=120.0,
        warmup=1,
        pairs=5,
        most_pairs=5,
        suspect_pairs=5,
        prompt_tokens=128,
        image_size=448,
        new_tokens=16,
        batch_sizes=(1, 4),
        batch_pairs=1,
        requests=4,
        request_new_tokens=8,
        load=1.0,
        objective_ttft=8.0,
        objective_tpot=3.0,
        heldout_tokens=256,
        window=128,
        decoded_tokens=16,
        longest_tokens=512,
        generations=1,
        generation_tokens=8,
        task_examples=8,
        task_distance=128,
        processes=1,
        energy_seconds=10.0,
    ),
}


def budget_for(scale: str, seconds: float | None = None) -> Budget:
    """The preset of a scale, or that preset scaled to `seconds` per category.

    Raises:
        UnknownName: a scale without a preset.
    """
    if scale not in PRESETS:
        raise UnknownName(f"no measuring budget for scale {scale!r}; there are: {', '.join(PRESETS)}")
    preset = PRESETS[scale]
    return preset if seconds is None else preset.scaled(seconds)
