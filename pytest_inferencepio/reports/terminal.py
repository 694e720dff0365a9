"""The summary at the end of a run: lines with a colour each, so that the caller decides whether to use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pytest_inferencepio import units
from pytest_inferencepio.reports import coverage, hardware, peers, tables
from pytest_inferencepio.reports.impact import NOTHING, Impact, impacts
from pytest_inferencepio.reports.markdown import grouped, unmeasured
from pytest_inferencepio.reports.run_data import RunData
from pytest_inferencepio.verdict import Outcome, Status

_HEADING = ("optimization", "speedup [95 %]", "whole inference", "per token", "peak memory", "gate")
_COLOURS = {
    Status.PASSED: "green",
    Status.REGRESSION: "red",
    Status.BUDGET_EXCEEDED: "red",
    Status.INCONCLUSIVE: "yellow",
    Status.NO_BASELINE: "yellow",
}
_LISTED = 20  # lines of a section before the rest is counted; the report files hold all


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of text; `colour` is red, yellow, green or empty, `bold` for headings."""

    text: str
    colour: str = ""
    bold: bool = False


def lines(data: RunData) -> list[Line]:
    """The whole summary, without colour codes."""
    found: list[Line] = []
    for group, rows in grouped(impacts(data.measured)).items():
        found += [Line(group, bold=True), *_table(rows), Line("")]
    found += [*_hardware(data), *_peers(data)]
    failing = [str(f) for f in data.findings(Outcome.BUDGET, Outcome.REGRESSION, Outcome.MISSING)]
    found += _section("regressions", [*failing, *(data.run.failures if data.run else ())], "red")
    found += _section("inconclusive", [str(f) for f in data.findings(Outcome.INCONCLUSIVE)], "yellow")
    found += _section("improved", [str(f) for f in data.findings(Outcome.IMPROVED)], "green")
    found += _section("no baseline", _no_baseline(data), "yellow")
    found += _section("refused", unmeasured(data.refused), "")
    found += _section("missing", unmeasured(data.missing), "yellow")
    found += _section("notes", _notes(data), "")
    return [*found, *_closing(data)]


def write(reporter: Any, data: RunData) -> None:
    """Print through pytest's terminal reporter, which leaves colours out where there is no terminal."""
    reporter.section("inference benchmarks")
    for line in lines(data):
        markup = {name: True for name in (line.colour, "bold" if line.bold else "") if name}
        reporter.write_line(line.text, **markup)


def _table(rows: Sequence[Impact]) -> list[Line]:
    """Two lines per optimization: the numbers in columns, then accuracy and what else was measured."""
    table = tables.aligned([_HEADING, *map(_cells, rows)], indent="  ")
    found = [Line(table[0])]
    for impact, text in zip(rows, table[1:], strict=True):
        colour = _COLOURS[impact.status] if impact.status is not Status.PASSED else ""
        found.append(Line(text, colour))
        if second := _second(impact):
            found.append(Line(f"      {second}"))
    return found


def _hardware(data: RunData) -> list[Line]:
    rows = hardware.rows(data.measured)
    if not rows:
        return []
    table = tables.aligned([hardware.HEADING, *rows], indent="  ")
    ceilings = "; ".join(hardware.ceilings(data.measured))
    return [Line("hardware", bold=True), Line(f"  this machine {ceilings}"), *map(Line, table), Line("")]


def _peers(data: RunData) -> list[Line]:
    rows = peers.rows(data.measured)
    table = tables.aligned([peers.HEADING, *rows], indent="  ") if rows else []
    shown = (
        [Line("peers: how many times as fast ours is", bold=True), *map(Line, table), Line("")]
        if rows
        else []
    )
    return shown + _section("peers not measured", peers.unmeasured(data.measured), "yellow")


def _cells(impact: Impact) -> tuple[str, ...]:
    return (
        impact.optimization,
        impact.speedup,
        impact.time("total_time", "speedup"),
        impact.time("time_per_output_token", "decode_speedup"),
        impact.memory(),
        impact.status.replace("_", " "),
    )


def _second(impact: Impact) -> str:
    accuracy = impact.accuracy()
    told = {
        "accuracy": accuracy,
        "first token": impact.time("time_to_first_token", "prefill_speedup"),
        "throughput": impact.throughput(),
        "weights": impact.weights(),
    }
    return "; ".join(f"{name} {text}" for name, text in told.items() if text != NOTHING)


def _section(title: str, entries: Sequence[str], colour: str) -> list[Line]:
    if not entries:
        return []
    shown = [Line(f"  {entry}", colour) for entry in entries[:_LISTED]]
    rest = len(entries) - len(shown)
    more = [Line(f"  and {rest} more, listed by --pio-report=DIR")] if rest else []
    return [Line(f"{title}: {len(entries)}", colour, bold=True), *shown, *more, Line("")]


def _no_baseline(data: RunData) -> list[str]:
    """One line per model and reason, with what it holds for: a first run would else print every cell."""
    told: dict[tuple[str, str], list[str]] = {}
    for finding in data.findings(Outcome.NO_BASELINE):
        who = f"{finding.cell.model} {finding.cell.scale}, {finding.cell.optimization}"
        told.setdefault((who, f"{finding.detail}; {finding.advice}"), []).append(finding.cell.category)
    return [f"{who} ({', '.join(categories)}): {why}" for (who, why), categories in told.items()]


def _notes(data: RunData) -> list[str]:
    return [*data.record_notes, *(str(finding) for finding in data.findings(Outcome.NOTE))]


def _closing(data: RunData) -> list[Line]:
    counts = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in data.status_counts.items() if n)
    total = f"coverage: {coverage.summary(data)}; verdicts: {counts or 'none'}; {units.quantity(data.seconds, 's')}"
    found = [Line(total, "red" if data.failed else "green", bold=True)]
    gate_would_fail = data.status_counts[Status.REGRESSION] or (data.run and data.run.failures)
    if gate_would_fail and not data.gated:
        found.append(Line("not gated: --benchmark-compare makes these regressions fail", "yellow"))
    if data.updated:
        found.append(Line(f"baseline updated: {', '.join(path.name for path in data.updated)}", "green"))
    return found
