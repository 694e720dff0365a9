"""Latency of single generations: first token, every later token, worst case; paired against a reference."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_inferencepio.measure.metrics import from_estimate, median_metric, ratio_metric, worst_metric
from pytest_inferencepio.measure.timing import Interleaver, Paired, synchronize
from pytest_inferencepio.record import Metric, metric, not_measured
from pytest_inferencepio.stats import median_estimate

if TYPE_CHECKING:
    from optimizations.runner import Runner

Inputs = Mapping[str, Any]
_ONE_STEP = "all tokens came out of one step, so there is no time between tokens; ask for more tokens"


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation in seconds: first token, gaps between later tokens, total; prompt length in tokens.

    Tokens of one speculative step share their moment, so some gaps are zero; their sum is what decoding took.
    """

    prompt_tokens: int
    time_to_first_token: float
    gaps: tuple[float, ...]
    total: float

    @property
    def decode_seconds(self) -> float:
        return sum(self.gaps)

    @property
    def time_per_output_token(self) -> float:
        """Mean over the tokens after the first; needs two tokens or more."""
        return self.decode_seconds / len(self.gaps)


def generate_once(runner: Runner, inputs: Inputs, new_tokens: int) -> Generation:
    """Greedy generation of exactly `new_tokens` (two or more) from `inputs` [1, prompt].

    Raises:
        ValueError: fewer than two tokens, or a runner that recorded another number of moments.
    """
    if new_tokens < 2:
        raise ValueError(f"a time per output token needs two tokens or more, got {new_tokens}")
    device = runner.model.device
    synchronize(device)
    start = time.perf_counter()
    _, moments = runner.timed_generate(new_tokens, **inputs)
    synchronize(device)
    end = time.perf_counter()
    if len(moments) != new_tokens:
        raise ValueError(f"{new_tokens} tokens were asked for, {len(moments)} moments were recorded")
    gaps = tuple(b - a for a, b in itertools.pairwise(moments))
    return Generation(inputs["input_ids"].shape[1], moments[0] - start, gaps, end - start)


def interleaver(
    before: Runner | None, after: Runner, inputs: Inputs, new_tokens: int, *, warmup: int = 1, seed: int = 0
) -> Interleaver[Generation]:
    """Pairs of generations from the same inputs, ready for `Interleaver.benchmark`."""
    return Interleaver(
        None if before is None else _generation(before, inputs, new_tokens),
        _generation(after, inputs, new_tokens),
        warmup=warmup,
        seed=seed,
        device=after.model.device,
    )


def _generation(runner: Runner, inputs: Inputs, new_tokens: int) -> Callable[[], Generation]:
    return lambda: generate_once(runner, inputs, new_tokens)


def speed_metrics(paired: Paired[Generation]) -> dict[str, Metric]:
    """Latency of the `after` side and, when there is a reference, its speed relative to it, pair by pair."""
    ratios = ratio_metrics(paired) if paired.before else {}
    return {**latency_metrics(paired.after), **ratios}


def latency_metrics(generations: Sequence[Generation]) -> dict[str, Metric]:
    """Median and worst case of first and later tokens, prefill and decode rates, total time."""
    first = [generation.time_to_first_token for generation in generations]
    per_token = [generation.time_per_output_token for generation in generations]
    gaps = [gap for generation in generations for gap in generation.gaps]
    return {
        "time_to_first_token": median_metric("time_to_first_token", first),
        "time_to_first_token_worst": worst_metric("time_to_first_token_worst", first),
        "time_per_output_token": median_metric("time_per_output_token", per_token),
        "time_per_output_token_worst": worst_metric("time_per_output_token_worst", gaps),
        "prefill_tokens_per_second": _rate("prefill_tokens_per_second", first, generations[0].prompt_tokens),
        "decode_tokens_per_second": _rate("decode_tokens_per_second", per_token, 1),
        "total_time": median_metric("total_time", [generation.total for generation in generations]),
    }


def _rate(name: str, seconds: Sequence[float], tokens: int) -> Metric:
    """`tokens` over the median of `seconds`; a speculative step may have yielded every token at once."""
    if min(seconds) <= 0:
        return not_measured(name, _ONE_STEP)
    return from_estimate(name, median_estimate(seconds).inverted(tokens), [tokens / s for s in seconds])


def ratio_metrics(paired: Paired[Generation]) -> dict[str, Metric]:
    """`speedup` (whole generation), `prefill_speedup`, `decode_speedup`: before / after of each pair."""
    sides = (paired.before, paired.after)
    total = [[g.total for g in side] for side in sides]
    first = [[g.time_to_first_token for g in side] for side in sides]
    decode = [[g.decode_seconds for g in side] for side in sides]
    one_step = min(map(min, decode)) <= 0
    return {
        "speedup": ratio_metric("speedup", *total),
        "prefill_speedup": ratio_metric("prefill_speedup", *first),
        "decode_speedup": not_measured("decode_speedup", _ONE_STEP)
        if one_step
        else ratio_metric("decode_speedup", *decode),
    }


def break_even_tokens(
    conversion_seconds: float, before: Sequence[Generation], after: Sequence[Generation]
) -> Metric:
    """After how many decoded tokens a conversion of `conversion_seconds` has paid for itself.

    Not measurable where decoding did not become faster: there is no such number.
    """
    times = [median_estimate([g.time_per_output_token for g in side]).value for side in (before, after)]
    saved = times[0] - times[1]
    if saved <= 0:
        return not_measured(
            "break_even_tokens", f"decoding takes {-saved:.3g} s more per token, so it never pays back"
        )
    return metric("break_even_tokens", conversion_seconds / saved, n=len(after))
