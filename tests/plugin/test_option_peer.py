"""--pio-peer: who is measured beside the row, who is not and why, and that all of it is reported."""

from __future__ import annotations

import importlib
import json
from typing import Any, ClassVar

import pytest
from inner_pytest import CONFTEST, Project

from pytest_inferencepio.naming import CATEGORIES
from pytest_inferencepio.peers import registry
from pytest_inferencepio.peers.contract import Peer, PeerRequest

FEW = """

def pytest_pio_workloads():
    return {"pairs": 3, "warmup": 1, "prompt_tokens": 16, "new_tokens": 3}
"""
BASE = ("--pio-model=small", "--pio-optimization=none")
RUN = (*BASE, "--pio-category=comparative", "--pio-report=out")


class Echo(Peer):
    """The unoptimized model against itself."""

    name: ClassVar[str] = "echo"
    summary: ClassVar[str] = "the same model once more"
    source: ClassVar[str] = "this test"
    requires: ClassVar[tuple[str, ...]] = ("torch",)
    install: ClassVar[str] = "pip install torch"
    distribution: ClassVar[str] = "torch"
    order: ClassVar[list[str]] = []
    needs: ClassVar[int] = 0

    def refusal(self, target: Any) -> str | None:
        return None

    def memory(self, request: PeerRequest) -> int:
        return self.needs

    def open(self, request: PeerRequest) -> Any:
        from pytest_inferencepio.peers.support.transformers_session import TransformersSession

        Echo.order.append("open")
        session = TransformersSession(request.model.load(request.load).runner, [f"{self.name}: once more"])
        generate, close = session.generate, session.close
        session.generate = lambda *a: (Echo.order.append("peer"), generate(*a))[1]  # type: ignore[method-assign]
        session.close = lambda: (Echo.order.append("close"), close())[1]  # type: ignore[method-assign, func-returns-value]
        return session


class Second(Echo):
    name: ClassVar[str] = "second"


class Absent(Echo):
    name: ClassVar[str] = "absent"
    requires: ClassVar[tuple[str, ...]] = ("no_such_module",)
    install: ClassVar[str] = "pip install no-such-module"


class Choosy(Echo):
    name: ClassVar[str] = "choosy"

    def refusal(self, target: Any) -> str | None:
        return f"it does not know {target.model_type}"


class Crashing(Echo):
    name: ClassVar[str] = "crashing"

    def open(self, request: PeerRequest) -> Any:
        from pytest_inferencepio.errors import MeasurementFailed

        raise MeasurementFailed("crashing ended (signal SIGABRT)")


class Full(Echo):
    name: ClassVar[str] = "full"

    def open(self, request: PeerRequest) -> Any:
        from pytest_inferencepio.errors import NotMeasurable

        raise NotMeasurable("the disk is full")


@pytest.fixture
def quick(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    for module in ("measure.against_peers", "peers.support.transformers_session"):
        importlib.import_module(f"pytest_inferencepio.{module}")
    project.pytester.makeconftest(CONFTEST + FEW)
    registry.peers()
    known = {kind.name: kind() for kind in (Echo, Second, Absent, Choosy, Crashing, Full)}
    monkeypatch.setattr(registry, "_registered", known)
    monkeypatch.setattr(Echo, "order", [])
    return project


def categories(nodeids: list[str]) -> set[str]:
    return {nodeid.split("::test_")[1].split("[")[0] for nodeid in nodeids}


def compare(project: Project, peers: str, *more: str) -> tuple[dict[str, Any], str]:
    """The record of the one cell, and what was printed."""
    result = project.run(*RUN, f"--pio-peer={peers}", "--benchmark-json=bench.json", *more)
    assert result.ret == 0, result.stdout.str() + result.stderr.str()
    (record,) = project.stored()
    return record, result.stdout.str()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], set(CATEGORIES)),
        (["--pio-peer=echo"], {*CATEGORIES, "comparative"}),
        (["--pio-peer=echo", "--pio-category=accuracy"], {"accuracy", "comparative"}),
        (["--pio-category=comparative"], {"comparative"}),
        (["--pio-category=hardware"], {"hardware"}),
    ],
)
def test_peers_bring_the_comparison_and_nothing_else_does(
    quick: Project, arguments: list[str], wanted: set[str]
) -> None:
    assert categories(quick.collected(*BASE, *arguments)) == wanted


def test_the_ini_is_the_default(quick: Project) -> None:
    quick.pytester.makeini("[pytest]\npio_peer = echo\npio_category = accuracy\n")
    assert categories(quick.collected(*BASE)) == {"accuracy", "comparative"}


def test_an_unknown_peer_lists_the_near_ones_before_any_work(quick: Project) -> None:
    told = quick.refused(*BASE, "--pio-peer=ecco")
    assert "--pio-peer: unknown peer 'ecco'; did you mean echo" in told


def test_it_needs_a_model(quick: Project) -> None:
    assert "--pio-peer says how to measure, but nothing says which models" in quick.refused("--pio-peer=echo")


def test_both_sides_are_measured_in_turn_with_an_interval(quick: Project) -> None:
    record, text = compare(quick, "echo")
    metrics = record["metrics"]
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert metrics[name]["value"] > 0 and metrics[f"{name}[echo]"]["value"] > 0
    ratio = metrics["decode_speedup[echo]"]
    assert ratio["n"] == 3 and len(ratio["samples"]) == 3
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert Echo.order == ["open", *["peer"] * 4, "close"]
    assert "echo: once more" in record["notes"]
    assert record["verdict"] == "passed" and "no baseline" not in text
    assert record["workload"]["prompt_tokens"] == 16
    report = (quick.path / "out" / "report.md").read_text()
    assert "## Peers" in report and "| small tiny | none | echo |" in report
    assert "peers: how many times as fast ours is" in text
    assert "pio: peers: echo (torch " in text


def test_several_peers_are_each_measured_in_pairs_of_their_own(quick: Project) -> None:
    record, _ = compare(quick, "echo,second")
    assert {"decode_speedup[echo]", "decode_speedup[second]"} <= record["metrics"].keys()
    assert Echo.order == ["open", *["peer"] * 4, "close"] * 2
    assert record["metrics"]["decode_tokens_per_second"]["n"] == 6


def test_who_is_not_there_or_refuses_is_reported_beside_the_others(quick: Project) -> None:
    record, text = compare(quick, "echo,absent,choosy,full")
    reasons = {
        "absent": "absent is not installed here (no_such_module not found): pip install no-such-module",
        "choosy": "choosy refuses small: it does not know qwen3",
        "full": "the disk is full",
    }
    report = (quick.path / "out" / "report.md").read_text()
    assert "## Peers not measured" in report
    coverage = json.loads((quick.path / "out" / "coverage.json").read_text())
    for name, reason in reasons.items():
        assert record["metrics"][f"decode_speedup[{name}]"]["reason"] == reason
        assert reason in report and reason in text
        assert coverage["ran"][0]["not_measured"][f"decode_speedup[{name}]"] == reason
    assert "full: the disk is full" in report
    assert record["metrics"]["decode_speedup[echo]"]["value"] > 0
    assert coverage["counts"]["missing"] == 0


def test_with_nobody_to_compare_with_the_cell_is_skipped_with_every_reason(quick: Project) -> None:
    result = quick.run(*RUN, "--pio-peer=absent,choosy", "-rs")
    result.assert_outcomes(skipped=1)
    assert Echo.order == []
    result.stdout.fnmatch_lines(
        ["SKIPPED*absent is not installed here*; choosy refuses small: it does not know qwen3"]
    )
    report = (quick.path / "out" / "report.md").read_text()
    assert "absent is not installed here" in report and "choosy refuses small" in report


def test_nothing_measurable_after_trying_is_a_skip_too(quick: Project) -> None:
    result = quick.run(*RUN, "--pio-peer=full", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*full: the disk is full"])


def test_a_peer_that_fails_fails_the_test(quick: Project) -> None:
    result = quick.run(*RUN, "--pio-peer=crashing")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*MeasurementFailed: crashing ended (signal SIGABRT)"])


def test_what_does_not_fit_beside_the_row_is_measured_after_it(
    quick: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_inferencepio.measure import against_peers
    from pytest_inferencepio.pairs import Pairs

    room = iter([10, 1000])
    monkeypatch.setattr(against_peers, "available_memory", lambda device: next(room))
    monkeypatch.setattr(Echo, "needs", 100)
    release = Pairs.release
    monkeypatch.setattr(
        Pairs, "release", lambda self, **more: (Echo.order.append("release"), release(self, **more))[1]
    )
    record, _ = compare(quick, "echo")
    start = Echo.order.index("open")
    assert Echo.order[start - 1 : start + 6] == ["release", "open", *["peer"] * 4, "close"]
    assert any("measured in blocks, first the row, then the peer" in note for note in record["notes"])
    assert record["metrics"]["decode_speedup[echo]"]["n"] == 3


def test_after_a_block_the_row_is_loaded_again_for_the_next_peer(
    quick: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_inferencepio.measure import against_peers

    room = iter([10, 1000, 1000])
    monkeypatch.setattr(against_peers, "available_memory", lambda device: next(room))
    monkeypatch.setattr(Echo, "needs", 100)
    record, _ = compare(quick, "echo,second", "--pio-scale=full")
    assert record["metrics"]["decode_speedup[second]"]["n"] == 3
    blocks = [note for note in record["notes"] if "measured in blocks" in note]
    assert len(blocks) == 1 and blocks[0].startswith("echo:")


def test_what_does_not_fit_at_all_is_said(quick: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_inferencepio.measure import against_peers

    monkeypatch.setattr(against_peers, "available_memory", lambda device: 2**30)
    monkeypatch.setattr(Echo, "needs", 2**31)
    result = quick.run(*RUN, "--pio-peer=echo", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*echo needs 2.00 GiB for this model, 1.00 GiB are available"])


def test_a_large_row_drops_the_unoptimized_model_for_the_peer(quick: Project) -> None:
    record, _ = compare(quick, "echo", "--pio-scale=full")
    assert record["scale"] == "full"
    assert "the unoptimized model was not kept, to make room for peers" in record["notes"]


def test_a_reference_that_is_loaded_is_dropped_for_the_peer(quick: Project) -> None:
    more = ("--pio-peer=echo", "--pio-category=hardware", "--pio-scale=full", "--benchmark-json=bench.json")
    assert quick.run(*BASE, *more).ret == 0
    by_category = {record["category"]: record for record in quick.stored()}
    dropped = "the unoptimized model was not kept, to make room for peers"
    assert dropped in by_category["comparative"]["notes"]
    assert dropped not in by_category["hardware"]["notes"]


def test_in_a_row_memory_comes_first_and_the_comparison_last(quick: Project) -> None:
    nodeids = quick.collected(
        "--pio-model=small", "--pio-optimization=none,wide_arithmetic", "--pio-peer=echo"
    )
    names = [nodeid.split("::test_")[1].split("[")[0] for nodeid in nodeids]
    assert len(names) == 2 * (len(CATEGORIES) + 1)
    for row in (names[: len(names) // 2], names[len(names) // 2 :]):
        assert row[0] == "memory_usage" and row[-1] == "comparative"


def test_a_peers_impossible_figure_fails_in_words(quick: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_inferencepio.measure import memory

    monkeypatch.setattr(memory, "bytes_read_per_step", lambda runner: 1e18)
    result = quick.run(*RUN, "--pio-peer=echo")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ImpossibleFigure: *exceeds*"])


def test_the_listing_shows_peers_what_they_refuse_and_what_to_install(quick: Project) -> None:
    text = " ".join(quick.run("--pio-list").stdout.str().split())
    assert "peers (--pio-peer)" in text
    assert "echo the same model once more" in text
    assert "absent is not installed here (no_such_module not found): pip install no-such-module" in text
    assert "refuses small: it does not know qwen3" in text


def test_peers_are_neither_stored_nor_asked_for(quick: Project) -> None:
    store = ("--pio-update-baseline", "--pio-baseline-dir=stored")
    result = quick.run("test_mine.py", "-k", "prefill or comparative", *BASE, "--pio-peer=echo", *store)
    assert result.ret == 0, result.stdout.str()
    stored = (quick.path / "stored" / "small-tiny.json").read_text()
    assert "prefill" in stored and "comparative" not in stored
    gate = ("--benchmark-compare", "--pio-require-baseline", "--pio-baseline-dir=stored")
    assert quick.run(*RUN, "--pio-peer=echo", *gate).ret == 0
