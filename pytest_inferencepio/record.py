"""The record of one benchmark: what stands under `extra_info["pio"]` in pytest-benchmark's JSON.

Read and written without torch, so that records can be compared anywhere.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from pytest_inferencepio.errors import RecordError

SCHEMA = 1
BETTER = ("higher", "lower")

# name -> (unit, better). Units are SI; "1" is a plain ratio or fraction. What there is several of carries a key in
# brackets: `read_bandwidth[16MiB]`, `decode_speedup[llama_cpp]`.
METRICS: dict[str, tuple[str, str]] = {
    "time_to_first_token": ("s", "lower"),
    "time_to_first_token_worst": ("s", "lower"),
    "time_per_output_token": ("s", "lower"),
    "time_per_output_token_worst": ("s", "lower"),
    "prefill_tokens_per_second": ("1/s", "higher"),
    "decode_tokens_per_second": ("1/s", "higher"),
    "output_tokens_per_second": ("1/s", "higher"),
    "requests_per_second": ("1/s", "higher"),
    "goodput": ("1/s", "higher"),
    "total_time": ("s", "lower"),
    "peak_memory": ("B", "lower"),
    "model_peak_memory": ("B", "lower"),  # what it exceeds a process without a model by
    "process_memory": ("B", "lower"),  # peak of a process without a model
    "weight_memory": ("B", "lower"),
    "allocator_peak": ("B", "lower"),
    "kv_bytes_per_token": ("B", "lower"),
    "memory_bandwidth": ("B/s", "higher"),
    "bytes_read_per_token": ("B", "lower"),
    "energy_per_token": ("J", "lower"),
    "perplexity": ("1", "lower"),
    "perplexity_ratio": ("1", "lower"),
    "kl_divergence": ("nat", "lower"),
    "logit_error": ("1", "lower"),
    "top1_agreement": ("1", "higher"),
    "task_exact_match": ("1", "higher"),
    "task_drop": ("1", "lower"),
    "generation_match": ("1", "higher"),
    "gradient_error": ("1", "lower"),
    "nonfinite_outputs": ("1", "lower"),
    "speedup": ("1", "higher"),
    "prefill_speedup": ("1", "higher"),
    "decode_speedup": ("1", "higher"),
    "throughput_ratio": ("1", "higher"),
    "memory_ratio": ("1", "lower"),
    "model_memory_ratio": ("1", "lower"),
    "weight_memory_ratio": ("1", "lower"),
    "conversion_time": ("s", "lower"),
    "break_even_tokens": ("1", "lower"),
    "recompilations": ("1", "lower"),
    "accepted_tokens_per_step": ("1", "higher"),
    "threads": ("1", "higher"),
    "read_bandwidth": ("B/s", "higher"),  # of the machine, by working set
    "arithmetic_peak": ("1/s", "higher"),  # of the machine, by data type: a multiply-add is two operations
    "arithmetic_rate": ("1/s", "higher"),  # that prefill reaches
    "flops_per_token": ("1", "lower"),
    "least_time_to_first_token": ("s", "lower"),  # what the machine allows
    "least_time_per_output_token": ("s", "lower"),
    "prefill_roofline_share": ("1", "higher"),  # least time / measured time
    "decode_roofline_share": ("1", "higher"),
}


@dataclasses.dataclass(frozen=True)
class Metric:
    """One estimate: value with its interval [low, high], count of samples, unit, which way is better.

    A quantity that could not be measured has `value` None and says why in `reason`.
    `samples` may keep the raw values (paired ratios, say) for the comparison.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str
    better: str
    reason: str | None = None
    samples: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.better not in BETTER:
            raise RecordError(f"better must be one of {BETTER}, got {self.better!r}")
        if self.value is None:
            if not self.reason:
                raise RecordError("a metric without a value needs the reason why it was not measured")
            return
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 0:
            raise RecordError(f"n must be a count, got {self.n!r}")
        if not math.isfinite(self.value):
            raise RecordError(f"a metric must be finite, got {self.value!r} {self.unit}")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise RecordError(f"interval [{self.low}, {self.high}] does not hold its value {self.value}")
        if not all(map(math.isfinite, self.samples)):
            raise RecordError(f"samples of a metric must be finite, got {self.samples}")

    @property
    def measured(self) -> bool:
        return self.value is not None


def metric(
    name: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    n: int = 1,
    samples: tuple[float, ...] = (),
) -> Metric:
    """A metric with the unit and direction that `METRICS` gives its name (RecordError when unknown)."""
    unit, better = definition(name)
    return Metric(float(value), low, high, n, unit, better, samples=tuple(map(float, samples)))


def not_measured(name: str, reason: str) -> Metric:
    """The metric `name` without a value, and why."""
    unit, better = definition(name)
    return Metric(None, None, None, 0, unit, better, reason=reason)


def keyed(name: str, key: str) -> str:
    """The name of one of several metrics `name`: `read_bandwidth[16MiB]`."""
    return f"{name}[{key}]"


def parts_of(name: str) -> tuple[str, str]:
    """Name and key of a metric; the key is empty for one that there is only one of."""
    match = re.fullmatch(r"(\w+)\[([^\[\]]+)\]", name)
    return (match[1], match[2]) if match else (name, "")


def definition(name: str) -> tuple[str, str]:
    """Unit and direction of the metric `name`, keyed or not.

    Raises:
        RecordError: `METRICS` does not know it.
    """
    base, _ = parts_of(name)
    if base not in METRICS:
        raise RecordError(f"unknown metric {name!r}; add it to record.METRICS with its unit and direction")
    return METRICS[base]


@dataclasses.dataclass(frozen=True)
class Record:
    """One cell of the matrix, measured.

    `fingerprint` is `machine.Fingerprint` as a mapping; `verdict` is one of
    passed, regression, inconclusive, no_baseline, budget_exceeded (filled by the comparison).
    `notes` are sentences for the report (a fallback that was taken, what could not be measured).
    """

    model: str
    scale: str
    optimization: str
    category: str
    device: str
    dtype: str
    workload: Mapping[str, Any]
    metrics: Mapping[str, Metric]
    fingerprint: Mapping[str, Any]
    verdict: str = "no_baseline"
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def cell(self) -> str:
        """Stable name of the cell: model/scale/optimization/category."""
        return f"{self.model}/{self.scale}/{self.optimization}/{self.category}"

    def to_json(self) -> dict[str, Any]:
        """Plain types only, ready for `extra_info["pio"]`."""
        plain = dataclasses.asdict(self)
        plain["metrics"] = {name: _metric_json(value) for name, value in self.metrics.items()}
        plain["notes"] = list(self.notes)
        return plain

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """Read what `to_json` wrote.

        Raises:
            RecordError: not a mapping, another schema, a missing or unknown key, a malformed metric.
        """
        if not isinstance(data, Mapping):
            raise RecordError(f"a record is a mapping, got {type(data).__name__}")
        if data.get("schema") != SCHEMA:
            raise RecordError(
                f"record schema {data.get('schema')!r} is not {SCHEMA}; measure again with this version"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = set(data) - names, names - set(data)
        if unknown or missing:
            raise RecordError(f"record keys do not fit: missing {sorted(missing)}, unknown {sorted(unknown)}")
        for key in _TEXTS:
            if not isinstance(data[key], str):
                raise RecordError(f"{key} must be a text, got {type(data[key]).__name__}")
        if not isinstance(data["notes"], list) or not all(isinstance(note, str) for note in data["notes"]):
            raise RecordError(f"notes must be a list of texts, got {data['notes']!r}")
        metrics = {name: _metric_from(name, value) for name, value in _mapping(data, "metrics").items()}
        mappings = {"workload": _mapping(data, "workload"), "fingerprint": _mapping(data, "fingerprint")}
        return cls(**{**data, **mappings, "metrics": metrics, "notes": tuple(data["notes"])})


def _metric_json(value: Metric) -> dict[str, Any]:
    plain = dataclasses.asdict(value)
    plain["samples"] = list(value.samples)
    return plain


_TEXTS = ("model", "scale", "optimization", "category", "device", "dtype", "verdict")


def _mapping(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data[key]
    if not isinstance(value, Mapping):
        raise RecordError(f"{key} must be a mapping, got {type(value).__name__}")
    return dict(value)


def _metric_from(name: str, data: Any) -> Metric:
    if not isinstance(data, Mapping):
        raise RecordError(f"metric {name!r} must be a mapping, got {type(data).__name__}")
    for key in ("value", "low", "high"):
        if data.get(key) is not None and not _is_number(data[key]):
            raise RecordError(f"metric {name!r}: {key} must be a number, got {type(data[key]).__name__}")
    for key in ("unit", "better"):
        if not isinstance(data.get(key, ""), str):
            raise RecordError(f"metric {name!r}: {key} must be a text, got {type(data[key]).__name__}")
    try:
        samples = tuple(data.get("samples", ()))
        if not all(map(_is_number, samples)):
            raise RecordError(f"metric {name!r}: samples must be numbers, got {samples!r}")
        return Metric(**{**data, "samples": samples})
    except TypeError as error:
        raise RecordError(f"metric {name!r} does not fit the schema: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
