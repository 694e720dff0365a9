"""Which cells ran, were refused and why, are missing and why: coverage.json and its numbers."""

from __future__ import annotations

from typing import Any

from pytest_inferencepio.reports.run_data import RunData
from pytest_inferencepio.verdict import CellKey, NotMeasured

SCHEMA = 1


def coverage(data: RunData) -> dict[str, Any]:
    """Plain types for coverage.json. A cell appears once; `counts` adds up over the lists."""
    ran = [
        {**_names(verdict.cell), "verdict": str(verdict.status), "not_measured": _gaps(number, data)}
        for number, verdict in enumerate(data.verdicts)
    ]
    refused, missing = ([_told(cell) for cell in cells] for cells in (data.refused, data.missing))
    absent = data.run.missing if data.run else {}
    gone = [{**_names(cell), "reason": why} for cell, why in absent.items() if not _listed(cell, data)]
    lists: dict[str, list[Any]] = {
        "ran": ran,
        "refused": refused,
        "missing": missing,
        "only_in_baseline": gone,
    }
    return {"schema": SCHEMA, "counts": {name: len(cells) for name, cells in lists.items()}, **lists}


def summary(data: RunData) -> str:
    """One sentence with the numbers."""
    counts = coverage(data)["counts"]
    text = f"{counts['ran']} ran, {counts['refused']} refused, {counts['missing']} missing"
    gone = counts["only_in_baseline"]
    return f"{text}, {gone} only in the baseline" if gone else text


def _names(cell: CellKey) -> dict[str, str]:
    return {
        "model": cell.model,
        "scale": cell.scale,
        "optimization": cell.optimization,
        "category": cell.category,
    }


def _told(cell: NotMeasured) -> dict[str, str]:
    return {
        "model": cell.model,
        "scale": cell.scale,
        "optimization": cell.optimization,
        "category": cell.category,
        "reason": cell.reason,
    }


def _gaps(number: int, data: RunData) -> dict[str, str]:
    """Metrics of a record that could not be measured, with the reason."""
    record, _ = data.measured[number]
    return {name: value.reason or "" for name, value in record.metrics.items() if not value.measured}


def _listed(cell: CellKey, data: RunData) -> bool:
    told = [_names(cell)]
    return any(
        {k: v for k, v in _told(other).items() if k != "reason"} in told
        for other in (*data.refused, *data.missing)
    )
