"""What the machine can do and how near each model comes, from the cells of the category `hardware`."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_inferencepio import units
from pytest_inferencepio.record import Metric, Record, parts_of
from pytest_inferencepio.verdict import Verdict

CATEGORY = "hardware"
HEADING = (
    "model",
    "optimization",
    "read per token",
    "least per token",
    "measured",
    "reached",
    "least first token",
    "measured",
    "reached",
)
_CEILINGS = {"read_bandwidth": "reads {} at {}", "arithmetic_peak": "computes {} operations in {}"}


def rows(measured: Sequence[tuple[Record, Verdict]]) -> list[tuple[str, ...]]:
    """One row per model and optimization under `HEADING`; empty without such cells."""
    return [_row(record) for record in _records(measured)]


def ceilings(measured: Sequence[tuple[Record, Verdict]]) -> list[str]:
    """The machine's bandwidths and peaks, a sentence each, the highest of the run."""
    best: dict[str, Metric] = {}
    for record in _records(measured):
        for name, value in record.metrics.items():
            if parts_of(name)[0] in _CEILINGS and (value.value or 0) > (
                best[name].value or 0 if name in best else 0
            ):
                best[name] = value
    return [_ceiling(name, value) for name, value in best.items()]


def _records(measured: Sequence[tuple[Record, Verdict]]) -> list[Record]:
    return [record for record, _ in measured if record.category == CATEGORY]


def _ceiling(name: str, value: Metric) -> str:
    base, key = parts_of(name)
    return _CEILINGS[base].format(units.quantity(value.value, value.unit), key)


def _row(record: Record) -> tuple[str, ...]:
    return (
        f"{record.model} {record.scale}",
        record.optimization,
        _quantity(record, "bytes_read_per_token"),
        _quantity(record, "least_time_per_output_token"),
        _quantity(record, "time_per_output_token"),
        _share(record, "decode_roofline_share"),
        _quantity(record, "least_time_to_first_token"),
        _quantity(record, "time_to_first_token"),
        _share(record, "prefill_roofline_share"),
    )


def _quantity(record: Record, name: str) -> str:
    found = record.metrics.get(name)
    return "-" if found is None else units.quantity(found.value, found.unit)


def _share(record: Record, name: str) -> str:
    found = record.metrics.get(name)
    return "-" if found is None or found.value is None else units.share(found.value, 3)
