"""Natural text: the Python standard library's source, read from the running interpreter.

The split into training and held-out files is by a hash of the file's path, so it is the same in every
patch release. The corpus as a whole is keyed by a digest over its contents: figures measured on another
interpreter's library carry another digest. `heldout_tokens` reads a fixed excerpt of held-out files that
ships with the package (PSF licence beside it), so that a stored perplexity means the same everywhere.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Not installed by every distribution, generated tables, or dropped by later Pythons.
EXCLUDED_PARTS = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "turtledemo",
        "ensurepip",
        "__phello__",
        "distutils",
        "__pycache__",
    ]
)
EXCERPT = Path(__file__).with_name("data") / "heldout_stdlib.txt"


@dataclass(frozen=True)
class Corpus:
    """Standard-library source split by path hash; `digest` is the sha256 over every path and content."""

    train: tuple[tuple[str, str], ...]
    heldout: tuple[tuple[str, str], ...]
    digest: str


def is_heldout(relative: str) -> bool:
    """Whether the file at this posix path under the library's root is never trained on (1 in 16)."""
    return hashlib.sha256(relative.encode()).digest()[0] % 16 == 0


def library_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (posix path, source) in path order, without excluded folders and generated modules."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_PARTS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        yield relative.as_posix(), path.read_text(encoding="utf-8")


def read_corpus(root: Path | None = None) -> Corpus:
    """Reads the library of the running interpreter (or of `root`). About 9 MB on Python 3.11."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = tuple(library_files(root))
    digest = hashlib.sha256()
    for name, source in files:
        digest.update(f"{name}\0{len(source)}\0".encode() + source.encode())
    train = tuple(file for file in files if not is_heldout(file[0]))
    heldout = tuple(file for file in files if is_heldout(file[0]))
    return Corpus(train, heldout, digest.hexdigest())


def heldout_text() -> str:
    """The shipped excerpt of held-out files, comment header removed."""
    header, _, body = EXCERPT.read_text(encoding="utf-8").partition("\n\n")
    if not header.startswith("#"):
        raise ValueError(f"{EXCERPT} has no licence header; reinstall the package or restore the file.")
    return body


def heldout_tokens(tokenizer: Any, n_tokens: int) -> list[int]:
    """The first `n_tokens` token ids of the shipped held-out excerpt; ValueError when it is shorter."""
    # Not verbose: the text is longer than a model's context, which matters only to who feeds it whole.
    ids = list(tokenizer(heldout_text(), add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < n_tokens:
        raise ValueError(
            f"The held-out excerpt has {len(ids)} tokens, {n_tokens} were asked for; ask for fewer."
        )
    return ids[:n_tokens]
