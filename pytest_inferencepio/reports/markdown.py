"""report.md, and the table of measured results in the README."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_inferencepio import units
from pytest_inferencepio.record import Record
from pytest_inferencepio.reports import coverage, hardware, peers, tables
from pytest_inferencepio.reports.impact import Impact, impacts
from pytest_inferencepio.reports.run_data import RunData
from pytest_inferencepio.verdict import NotMeasured, Outcome, Verdict

_SECTIONS = (
    ("Regressions", (Outcome.REGRESSION, Outcome.MISSING, Outcome.BUDGET)),
    ("Inconclusive", (Outcome.INCONCLUSIVE,)),
    ("Improved", (Outcome.IMPROVED,)),
    ("No baseline", (Outcome.NO_BASELINE,)),
)
_HEADING = (
    "optimization",
    "speedup [95 %]",
    "whole inference",
    "first token",
    "per token",
    "throughput",
    "peak memory",
    "weights",
    "accuracy",
    "gate",
)


def report(data: RunData) -> str:
    """The whole report as Markdown."""
    lines = ["# Inference benchmark report", "", _headline(data), ""]
    lines += _machine(data)
    for group, rows in grouped(impacts(data.measured)).items():
        lines += [f"## {group}", "", *tables.markdown([_HEADING, *map(_cells, rows)]), ""]
    lines += [*_hardware(data), *_peers(data)]
    for title, outcomes in _SECTIONS:
        lines += _section(title, [str(finding) for finding in data.findings(*outcomes)])
    lines += _section("Failures of the run", data.run.failures if data.run else ())
    lines += _section("Refused", unmeasured(data.refused))
    lines += _section("Missing", unmeasured(data.missing))
    lines += _section("Notes", data.record_notes)
    return "\n".join(lines).rstrip() + "\n"


def results_table(measured: Sequence[tuple[Record, Verdict]]) -> str:
    """One row per model and optimization, for the README."""
    heading = ("model", "optimization", "speedup [95 %]", "per token", "peak memory", "weights", "accuracy")
    rows = [
        (
            impact.model,
            impact.optimization,
            impact.speedup,
            impact.time("time_per_output_token", "decode_speedup"),
            impact.memory(),
            impact.weights(),
            impact.accuracy(),
        )
        for impact in impacts(measured)
    ]
    return "\n".join(tables.markdown([heading, *rows])) + "\n"


def grouped(rows: Sequence[Impact]) -> dict[str, list[Impact]]:
    """Impacts by model, scale, device and type, in the order of the run."""
    groups: dict[str, list[Impact]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def _cells(impact: Impact) -> tuple[str, ...]:
    return (
        impact.optimization,
        impact.speedup,
        impact.time("total_time", "speedup"),
        impact.time("time_to_first_token", "prefill_speedup"),
        impact.time("time_per_output_token", "decode_speedup"),
        impact.throughput(),
        impact.memory(),
        impact.weights(),
        impact.accuracy(),
        impact.status.replace("_", " "),
    )


def _headline(data: RunData) -> str:
    counts = ", ".join(
        f"{number} {status.replace('_', ' ')}" for status, number in data.status_counts.items() if number
    )
    return f"{coverage.summary(data)} in {units.quantity(data.seconds, 's')}: {counts or 'nothing was measured'}."


def _machine(data: RunData) -> list[str]:
    told = [
        f"{key} {data.fingerprint[key]}"
        for key in ("cpu", "isa", "threads", "device")
        if data.fingerprint.get(key)
    ]
    return [f"Measured on {', '.join(told)}.", ""] if told else []


def _hardware(data: RunData) -> list[str]:
    rows = hardware.rows(data.measured)
    if not rows:
        return []
    table = tables.markdown([hardware.HEADING, *rows])
    return ["## Hardware", "", *(f"- {line}" for line in hardware.ceilings(data.measured)), "", *table, ""]


def _peers(data: RunData) -> list[str]:
    rows = peers.rows(data.measured)
    table = tables.markdown([peers.HEADING, *rows]) if rows else []
    lines = ["## Peers", "", *table, ""] if rows else []
    return lines + _section("Peers not measured", peers.unmeasured(data.measured))


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {line}" for line in lines), ""] if lines else []


def unmeasured(cells: Sequence[NotMeasured]) -> list[str]:
    """Reasons with the categories they hold for, so that one refusal is one line."""
    told: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        told.setdefault((f"{cell.model} {cell.scale}, {cell.optimization}", cell.reason), []).append(
            cell.category
        )
    return [f"{who} ({', '.join(categories)}): {reason}" for (who, reason), categories in told.items()]
