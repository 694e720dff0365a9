"""Writes the shipped held-out excerpt and the licence it is under: `python -m training.excerpt`."""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

from pytest_inferencepio.tasks.text import EXCERPT, read_corpus

SIZE = 64_000
PER_FILE = 8_000
HEADER = """\
# Excerpts from {n} files of the Python {version} standard library, never trained on; fixed so that a
# stored perplexity means the same on every machine.
# Copyright (c) 2001 Python Software Foundation. All Rights Reserved. Licence: LICENSE.psf beside this file.
"""


def excerpt(heldout: tuple[tuple[str, str], ...]) -> tuple[str, int]:
    """Up to 8,000 characters from the middle of each larger held-out file, whole lines, 64,000 in all."""
    pieces = []
    for _, source in heldout:
        if len(source) > PER_FILE and sum(map(len, pieces)) < SIZE:
            start = source.index("\n", (len(source) - PER_FILE) // 2) + 1
            pieces.append(source[start : source.index("\n", start + PER_FILE - 400) + 1])
    return "".join(pieces), len(pieces)


def main() -> None:
    """Writes both files beside pytest_inferencepio/tasks/text.py."""
    text, n = excerpt(read_corpus().heldout)
    EXCERPT.parent.mkdir(exist_ok=True)
    EXCERPT.write_text(HEADER.format(n=n, version=platform.python_version()) + "\n" + text, encoding="utf-8")
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    EXCERPT.with_name("LICENSE.psf").write_text(licence.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main()
