"""The corpus split, and what ships of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_inferencepio.tasks.text import EXCERPT, Corpus, heldout_text, is_heldout, read_corpus


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus()


def test_no_file_is_in_both_parts_and_neither_is_small(corpus: Corpus) -> None:
    train, heldout = {name for name, _ in corpus.train}, {name for name, _ in corpus.heldout}
    assert not train & heldout
    assert all(map(is_heldout, heldout))
    assert not any(map(is_heldout, train))
    assert len(heldout) > 10
    assert len(train) > 10 * len(heldout)


def test_tests_and_generated_tables_are_left_out(corpus: Corpus) -> None:
    names = [Path(name) for name, _ in (*corpus.train, *corpus.heldout)]
    assert not [name for name in names if {"test", "site-packages", "encodings"} & set(name.parts)]


def test_the_digest_follows_the_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = read_corpus(tmp_path).digest
    assert before == read_corpus(tmp_path).digest
    (tmp_path / "a.py").write_text("x = 2\n")
    assert read_corpus(tmp_path).digest != before


def test_the_excerpt_is_of_heldout_files_and_carries_its_licence(corpus: Corpus) -> None:
    assert "Python Software Foundation" in EXCERPT.read_text().partition("\n\n")[0]
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in EXCERPT.with_name("LICENSE.psf").read_text()
    training = "\0".join(source for _, source in corpus.train)
    shipped = heldout_text().splitlines(keepends=True)
    passages = ["".join(shipped[start : start + 12]) for start in range(0, len(shipped) - 12, 6)]
    assert len(passages) > 200
    # The library repeats itself: 1.7 % on 3.11 (bz2 is written like lzma, aifc like sunau). A file trained on by
    # mistake would be a tenth of the excerpt.
    assert sum(passage in training for passage in passages) < 0.03 * len(passages)
