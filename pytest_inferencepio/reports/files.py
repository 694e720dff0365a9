"""The files of --pio-report=DIR, each written in full or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_inferencepio.baselines import write_atomically
from pytest_inferencepio.reports import coverage, json_report, markdown
from pytest_inferencepio.reports.run_data import RunData


def write(directory: Path, data: RunData) -> list[Path]:
    """Write summary.json, report.md and coverage.json into `directory` (made if needed)."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = {
        "summary.json": _json(json_report.summary(data)),
        "report.md": markdown.report(data),
        "coverage.json": _json(coverage.coverage(data)),
    }
    for name, text in texts.items():
        write_atomically(directory / name, text)
    return [directory / name for name in texts]


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
