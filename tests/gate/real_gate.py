"""The whole gate on a real tiny model with a user's techniques, sound or faulty; also a demonstration.

    python tests/gate/real_gate.py [--slow=0.10] [--sessions=5] [--passes=10] [--category=...] [--rows=...]

stores sessions of sound techniques as baselines, runs the gate unchanged several times, then once with a slower
kernel, doubled memory and a perturbed weight, and prints which cells failed. It times things: leave the machine
alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

MODEL = "qwen3_4b_instruct_2507"
NAMES = {"slow_kernel": "SlowKernel", "hungry_cache": "HungryCache", "perturbed_weight": "PerturbedWeight"}


class Gate:
    """A user's project in `path`: techniques in an installed package, baselines, runs of the shipped suite."""

    def __init__(self, path: Path, conftest: str = "") -> None:
        self.path = path
        self.site = path / "site"
        information = self.site / "faulty_techniques-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: faulty-techniques\nVersion: 1.0\n"
        )
        entries = "\n".join(f"{name} = faulty_techniques:{cls}" for name, cls in NAMES.items())
        (information / "entry_points.txt").write_text(f"[pytest_inferencepio.optimizations]\n{entries}\n")
        source = Path(__file__).with_name("faulty_techniques.py").read_text()
        (self.site / "faulty_techniques.py").write_text(source)
        (path / "pytest.ini").write_text("[pytest]\n")
        (path / "conftest.py").write_text(conftest)

    def run(
        self, *arguments: str, fault: str = "", rows: str = ",".join(NAMES)
    ) -> subprocess.CompletedProcess[str]:
        """One `pytest --pio-model=...`; failures go to failures.xml."""
        command = [sys.executable, "-m", "pytest", f"--pio-model={MODEL}", f"--pio-optimization={rows}"]
        return subprocess.run(
            [
                *command,
                "--pio-baseline-dir=baselines",
                "--junitxml=failures.xml",
                "-p",
                "no:cacheprovider",
                *arguments,
            ],
            check=False,
            cwd=self.path,
            # Options of the outer pytest's environment are not meant for this one.
            env={**os.environ, "PYTEST_ADDOPTS": "", "PYTHONPATH": str(self.site), "FAULT": fault},
            capture_output=True,
            text=True,
            timeout=3600,
        )

    def failures(self) -> dict[str, str]:
        """Test name -> message of the tests that failed in the last run."""
        return {
            str(case.get("name")): "".join(failure.text or "" for failure in case.iter("failure"))
            for case in ET.parse(self.path / "failures.xml").getroot().iter("testcase")
            if case.find("failure") is not None
        }

    def spread(self) -> str:
        """Stored sessions of each speed ratio, for the record of a demonstration."""
        (path,) = (self.path / "baselines").glob("*.json")
        cells = json.loads(path.read_text())["cells"]
        lines = [
            f"{cell} {name}: {[value['value'] for value in metric['values'].values()]}"
            for cell, stored in cells.items()
            for name, metric in stored["metrics"].items()
            if "speedup" in name
        ]
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--slow", type=float, default=0.10, help="extra time of the slow kernel, as a fraction"
    )
    # Six times the weights of 5.6 MB: about what the whole model takes at its peak, so that this doubles.
    parser.add_argument(
        "--hungry", type=float, default=6.0, help="memory held for nothing, in multiples of the weights"
    )
    parser.add_argument("--sessions", type=int, default=5, help="runs stored as baselines")
    parser.add_argument("--passes", type=int, default=10, help="unchanged runs that have to pass")
    parser.add_argument("--category", default="accuracy,inference_speed,memory_usage")
    parser.add_argument("--rows", default=",".join(NAMES), help="techniques beside the unoptimized model")
    options = parser.parse_args()
    categories = f"--pio-category={options.category}"
    rows = f"none,{options.rows}"
    with tempfile.TemporaryDirectory() as directory:
        gate = Gate(Path(directory))
        for _ in range(options.sessions):
            done = gate.run(categories, "--pio-update-baseline", rows=rows)
            assert done.returncode == 0, done.stdout + done.stderr
        print(gate.spread())
        for number in range(options.passes):
            done = gate.run(categories, "--benchmark-compare", rows=rows)
            print(f"unchanged {number + 1}: exit {done.returncode} {gate.failures() or ''}", flush=True)
        faults = f"slow_kernel={options.slow},hungry_cache={options.hungry},perturbed_weight=0.2"
        done = gate.run(categories, "--benchmark-compare", fault=faults, rows=rows)
        print(f"faulty: exit {done.returncode}")
        for name, message in gate.failures().items():
            print(f"{name}\n  {message}")
        # What was not proven is as telling as what failed.
        print(
            *(line for line in done.stdout.splitlines() if line.lstrip().startswith("inconclusive:")),
            sep="\n",
        )


if __name__ == "__main__":
    main()
