"""The bench's own machinery: candidates take turns both ways, and limits are what the kernels cannot exceed."""

from __future__ import annotations

import pytest
import torch

from optimizations.native.bench_tools import (
    COLD,
    Candidate,
    Limits,
    copies,
    interleaved,
    measure_limits,
    show,
)
from optimizations.native.loader import native


def test_candidates_take_turns_and_the_order_turns_round() -> None:
    calls: list[str] = []
    candidates = [Candidate(name, 1, lambda i, n=name: calls.append(f"{n}{i}")) for name in "ab"]
    times = interleaved(candidates, 3)
    assert calls == ["b0", "a0", "a1", "b1", "b2", "a2", "a3", "b3"]
    assert set(times) == {"a", "b"}
    assert all(seconds > 0 for seconds in times.values())


@pytest.mark.parametrize("nbytes", [1 << 20, 5 << 20, 200 << 20])
def test_copies_exceed_the_caches(nbytes: int) -> None:
    assert copies(nbytes) * nbytes >= COLD
    assert (copies(nbytes) - 1) * nbytes < COLD


def test_dot_products_counts_what_it_does(isa: str) -> None:
    memory = torch.ones(64, dtype=torch.uint8)
    assert native().dot_products(memory.data_ptr(), 7, 1) == 7 * 12 * 64
    with pytest.raises(ValueError, match="rounds must be positive"):
        native().dot_products(memory.data_ptr(), 0, 1)


def test_tile_products_counts_what_it_does_and_nothing_without_tiles(isa: str) -> None:
    memory = torch.ones(1024, dtype=torch.uint8)
    for bf16, columns in ((True, 32), (False, 64)):
        done = native().tile_products(memory.data_ptr(), 7, bf16, 1)
        assert done == (7 * 4 * 16 * 16 * columns if isa == "amx" else 0)
    with pytest.raises(ValueError, match="rounds must be positive"):
        native().tile_products(memory.data_ptr(), 0, True, 1)


def test_table_names_every_candidate_and_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    limits = measure_limits(1)
    assert limits.read > 0
    assert limits.arithmetic is not None
    assert limits.arithmetic > 0
    words = torch.ones(1 << 20, dtype=torch.uint8)
    call = Candidate(
        "torch sum", words.nbytes, lambda _: native().stream_read(words.data_ptr(), words.nbytes, 1)
    )
    show("title", [call], 1.0, 2, limits)
    out = capsys.readouterr().out
    assert "title" in out
    assert "torch sum" in out
    assert "1.00x torch sum" in out


def test_without_an_arithmetic_limit_the_table_has_no_share_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    show("title", [Candidate("call", 1, lambda _: None)], 1.0, 2, Limits(1e9, None))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.count("%") == 1
    assert line.rstrip().endswith("GFLOP/s")
