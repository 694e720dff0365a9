"""Records and baselines as the suite would make them, from numbers."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_inferencepio import baselines
from pytest_inferencepio.baselines import Baselines
from pytest_inferencepio.comparison import compare
from pytest_inferencepio.record import Metric, Record, metric
from pytest_inferencepio.stats import ratio_estimate
from pytest_inferencepio.verdict import Outcome, Verdict

HERE = {"machine_class": "cpu=A isa=avx512 threads=2", "isa": "avx512", "commit": "0" * 40, "threads": 2}
SAME_ISA = {"machine_class": "cpu=B isa=avx512 threads=8", "isa": "avx512", "commit": "0" * 40, "threads": 8}
OTHER_ISA = {"machine_class": "cpu=C isa=neon threads=8", "isa": "neon", "commit": "0" * 40, "threads": 8}
WORKLOAD = {"prompt": 64, "new_tokens": 16}


def record(
    metrics: Mapping[str, Metric],
    *,
    model: str = "qwen3_4b_instruct_2507",
    optimization: str = "weight_int4",
    category: str = "inference_speed",
    fingerprint: Mapping[str, Any] = HERE,
    workload: Mapping[str, Any] = WORKLOAD,
) -> Record:
    """A tiny-scale CPU record."""
    return Record(model, "tiny", optimization, category, "cpu", "bfloat16", workload, metrics, fingerprint)


def ratio(
    value: float, *, name: str = "decode_speedup", pairs: int = 20, noise: float = 0.0, seed: int = 0
) -> dict[str, Metric]:
    """A speed ratio from `pairs` paired samples with log-normal jitter of standard deviation `noise`."""
    draw = random.Random(seed)
    samples = [value * math.exp(draw.gauss(0, noise)) for _ in range(pairs)]
    return {name: ratio_metric(name, samples)}


def ratio_metric(name: str, samples: Sequence[float]) -> Metric:
    """The metric as the suite builds it from paired ratios."""
    estimate = ratio_estimate([math.log(sample) for sample in samples])
    return metric(name, estimate.value, estimate.low, estimate.high, estimate.n, tuple(samples))


def stored(tmp_path: Path, *records: Record, sessions: int = 1) -> Baselines:
    """Baselines holding each of `records`, `sessions` times over."""
    found = baselines.read(tmp_path / "baselines")
    for number in range(sessions):
        for one in records:
            found = store(found, one, f"2026-01-0{1 + number}T00:00:00Z")
    return found


def store(found: Baselines, one: Record, session: str) -> Baselines:
    """`found` with one more record, read back from the disk."""
    verdict = compare(one, found.entry(one))
    baselines.update(found, [(one, verdict)], session=session)
    return baselines.read(found.directory)


def judged(found: Baselines, now: Record, **arguments: Any) -> Verdict:
    """The verdict about `now` against `found`."""
    return compare(now, found.entry(now), **arguments)


def elsewhere(one: Record, fingerprint: Mapping[str, Any]) -> Record:
    """The same record from another machine."""
    return dataclasses.replace(one, fingerprint=fingerprint)


def verdict_about(
    tmp_path: Path, before: Mapping[str, Metric], after: Mapping[str, Metric], **named: object
) -> Verdict:
    """The verdict when the baseline holds `before` and the run measured `after`."""
    base = record(before, **named)  # type: ignore[arg-type]
    return judged(stored(tmp_path, base), dataclasses.replace(base, metrics=dict(after)))


def only(verdict: Verdict, outcome: Outcome) -> str:
    """The one finding with `outcome`, as text."""
    (found,) = verdict.of(outcome)
    return str(found)
