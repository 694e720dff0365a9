"""summary.json: every record, every verdict, every finding, for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from pytest_inferencepio.reports.coverage import coverage
from pytest_inferencepio.reports.run_data import RunData
from pytest_inferencepio.verdict import Finding, Verdict

SCHEMA = 1


def summary(data: RunData) -> dict[str, Any]:
    """Plain types for summary.json. `passed` is False when a test failed or would have under the gate."""
    return {
        "schema": SCHEMA,
        "passed": not data.failed,
        "gated": data.gated,
        "seconds": round(data.seconds, 3),
        "fingerprint": dict(data.fingerprint),
        "counts": {str(status): number for status, number in data.status_counts.items()},
        "coverage": coverage(data)["counts"],
        "failures": list(data.run.failures) if data.run else [],
        "notes": data.record_notes,
        "updated": [path.name for path in data.updated],
        "cells": [{**record.to_json(), **_verdict(verdict)} for record, verdict in data.measured],
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": str(verdict.status),
        "findings": [finding_json(finding) for finding in verdict.findings],
    }


def finding_json(finding: Finding) -> dict[str, Any]:
    """A finding as plain types; `message` is the line a person reads."""
    plain = dataclasses.asdict(finding)
    del plain["cell"]
    return {**plain, "outcome": str(finding.outcome), "message": str(finding)}
