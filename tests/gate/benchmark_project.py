"""A project with a benchmark suite, run by the real pytest-benchmark in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from gate_records import ratio, record

from pytest_inferencepio.record import Record, metric

# A benchmark that really computes; WORK sets how much, the record travels in extra_info as the suite's does.
SUITE = """
import os, json, pytest
WORK = int(os.environ["WORK"])
RECORD = json.loads(os.environ["RECORD"])

@pytest.mark.parametrize("optimization", os.environ["ROWS"].split(","))
def test_speed(benchmark, optimization):
    benchmark.pedantic(lambda: sum(range(5_000 * WORK)), rounds=10, warmup_rounds=2)
    benchmark.extra_info["pio"] = {**RECORD, "optimization": optimization}
    assert not os.environ["BROKEN"], "the answers are wrong"
"""
GATED = """
import os, json, pathlib, pytest
from pytest_inferencepio import baselines
from pytest_inferencepio.comparison import compare
from pytest_inferencepio.record import Record

def test_speed(benchmark):
    benchmark.pedantic(lambda: sum(range(5_000)), rounds=5)
    now = Record.from_json(json.loads(os.environ["RECORD"]))
    verdict = compare(now, baselines.read(pathlib.Path(os.environ["BASELINES"])).entry(now))
    if verdict.failed:
        pytest.fail(verdict.message, pytrace=False)
"""
# Asking the operating system for the processor takes a second; everything else of the machine stays real.
CONFTEST = """
import platform

def pytest_benchmark_generate_machine_info(config):
    return {"machine": platform.machine(), "cpu": {"brand_raw": "this processor"}}
"""
# What the caller's environment may also have a use for; a test overrides it.
OWN = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": "",
    "WORK": "1",
    "ROWS": "weight_int4,kv_int8",
    "BROKEN": "",
}
PLUGINS = ("-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin")
SAVE = ("--benchmark-autosave",)
# The minimum, because a busy machine moves the mean by a factor by itself. Fourteen times: as far from the same work on
# a machine that became slower meanwhile as from MORE work on one that became faster.
COMPARE = ("--benchmark-compare", "--benchmark-compare-fail=min:1300%")
MORE = "200"  # WORK of a regression: 200 times as much


def one_record(speedup: float = 2.0, perplexity: float = 9.0) -> Record:
    return record({**ratio(speedup), "perplexity": metric("perplexity", perplexity)})


class Project:
    """A directory with a benchmark suite in it, run by the real pytest-benchmark."""

    def __init__(self, path: Path, suite: str = SUITE) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / "test_suite.py").write_text(suite)
        (path / "pytest.ini").write_text("[pytest]\n")
        (path / "conftest.py").write_text(CONFTEST)

    def run(
        self, *arguments: str, record: Record | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        told = json.dumps((record or one_record()).to_json())
        return subprocess.run(
            [sys.executable, "-m", "pytest", *PLUGINS, *arguments],
            check=False,
            cwd=self.path,
            env={**os.environ, **OWN, "RECORD": told, **environment},
            capture_output=True,
            text=True,
            timeout=1800,
        )

    def saved(self) -> list[Path]:
        return sorted((self.path / ".benchmarks").rglob("*.json"))

    def records(self, number: int = -1) -> list[Record]:
        return [
            Record.from_json(one["extra_info"]["pio"])
            for one in json.loads(self.saved()[number].read_text())["benchmarks"]
        ]

    def fullnames(self, number: int = -1) -> list[str]:
        return [one["fullname"] for one in json.loads(self.saved()[number].read_text())["benchmarks"]]


def compare_command(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", *arguments],
        check=False,
        cwd=where,
        capture_output=True,
        text=True,
        timeout=1800,
    )
