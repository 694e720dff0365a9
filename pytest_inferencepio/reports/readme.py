"""The results table of a README, from the summary of a run.

python -m pytest_inferencepio.reports.readme report/summary.json [README.md]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_inferencepio.baselines import cell_of, write_atomically
from pytest_inferencepio.errors import RecordError
from pytest_inferencepio.record import Record
from pytest_inferencepio.reports import markdown
from pytest_inferencepio.verdict import verdict_of

BEGIN, END = "<!-- results: begin", "<!-- results: end -->"


def table_of(summary: Mapping[str, Any]) -> str:
    """Machine, commit and the results table of a `summary.json`.

    Raises:
        RecordError: the summary has no cells or one that is no record.
    """
    cells = summary.get("cells")
    if not cells:
        raise RecordError("the summary holds no measured cell; run with --pio-report=DIR first")
    records = [
        Record.from_json({key: value for key, value in cell.items() if key != "findings"}) for cell in cells
    ]
    machine = records[0].fingerprint
    where = (
        f"Measured at commit `{str(machine.get('commit'))[:10]}` on {machine.get('cpu')}, "
        f"{machine.get('cores')} cores, {machine.get('isa')}; {len(records)} cells in {summary['seconds']:.0f} s. "
        "Row `none` is the unoptimized model against a second copy of itself: the noise of the machine."
    )
    return (
        where + "\n\n" + markdown.results_table([(each, verdict_of(cell_of(each), [])) for each in records])
    )


def replace_between_markers(text: str, table: str) -> str:
    """`text` with everything between the two markers replaced; ValueError when they are missing."""
    lines = text.splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line.startswith(BEGIN)]
    ends = [i for i, line in enumerate(lines) if line.startswith(END)]
    if len(starts) != 1 or len(ends) != 1 or ends[0] < starts[0]:
        raise ValueError(f"expected one line starting with {BEGIN!r} and one with {END!r} after it")
    return "".join([*lines[: starts[0] + 1], "\n", table, "\n", *lines[ends[0] :]])


def main(arguments: Sequence[str]) -> int:
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    readme = Path(arguments[1] if len(arguments) == 2 else "README.md")
    summary = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    text = replace_between_markers(readme.read_text(encoding="utf-8"), table_of(summary))
    write_atomically(readme, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
