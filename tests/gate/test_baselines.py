"""Stored runs: what a file keeps, how it reads, what an update refuses."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from gate_records import HERE, OTHER_ISA, SAME_ISA, elsewhere, judged, ratio, record, store, stored

from pytest_inferencepio import baselines
from pytest_inferencepio.comparison import compare
from pytest_inferencepio.errors import BaselineError
from pytest_inferencepio.record import Record, metric
from pytest_inferencepio.sessions import PRIOR_BIAS
from pytest_inferencepio.verdict import Status

FILE = "qwen3_4b_instruct_2507-tiny.json"
FULL = {
    **ratio(2.0, noise=0.02),
    "perplexity": metric("perplexity", 9.123456789),
    "weight_memory": metric("weight_memory", 123456789),
    "task_exact_match": metric("task_exact_match", 0.75, samples=(1.0, 1.0, 0.0, 1.0)),
}


def text_of(tmp_path: Path) -> str:
    return (tmp_path / "baselines" / FILE).read_text()


def sessions_of(tmp_path: Path, name: str) -> list[str]:
    (cell,) = json.loads(text_of(tmp_path))["cells"].values()
    return list(cell["metrics"][name]["values"])


def test_what_was_stored_is_read_back(tmp_path: Path) -> None:
    now = record(FULL)
    entry = stored(tmp_path, now).entry(now)
    assert entry is not None
    assert dict(entry.workload) == {"prompt": 64, "new_tokens": 16}
    assert entry.metrics["perplexity"].latest.value == 9.12346
    assert entry.metrics["weight_memory"].latest.value == 123456789
    assert entry.metrics["task_exact_match"].latest.examples == "1101"
    speed = entry.metrics["decode_speedup"].latest
    assert speed.low is not None and speed.high is not None
    assert speed.low <= speed.value <= speed.high
    assert speed.n == 20
    assert entry.metrics["decode_speedup"].same_machine


def test_no_directory_and_no_cell_are_no_baseline(tmp_path: Path) -> None:
    assert baselines.read(tmp_path / "nowhere").entry(record({})) is None
    assert stored(tmp_path, record(FULL)).entry(record(FULL, optimization="kv_int8")) is None
    assert stored(tmp_path, record(FULL)).entry(record(FULL, model="qwen3_vl_2b")) is None


def test_a_metric_is_one_line_and_the_order_is_stable(tmp_path: Path) -> None:
    one, two = record(FULL), record(FULL, optimization="kv_int8")
    stored(tmp_path / "a", one, two)
    stored(tmp_path / "b", two, one)
    text = text_of(tmp_path / "a")
    assert json.loads(text) == json.loads(text_of(tmp_path / "b"))
    assert sum('"perplexity": {' in line for line in text.splitlines()) == 2
    assert '"value": 123456789}' in text  # whole numbers without .0
    cells = list(json.loads(text)["cells"])
    assert cells == sorted(cells)


def test_a_change_of_one_metric_changes_its_line_and_the_session(tmp_path: Path) -> None:
    found = stored(tmp_path, record({"perplexity": metric("perplexity", 9.0), **FULL}))
    before = text_of(tmp_path).splitlines()
    changed = record({**FULL, "perplexity": metric("perplexity", 9.5)})
    store(found, changed, "2026-01-01T00:00:00Z")
    differing = [line for line in text_of(tmp_path).splitlines() if line not in before]
    assert len(differing) == 1
    assert '"perplexity"' in differing[0]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    found = stored(tmp_path, record(FULL))
    text = text_of(tmp_path)
    baselines.write_file(found.directory, found.files["qwen3_4b_instruct_2507", "tiny"])
    assert text_of(tmp_path) == text


def test_five_sessions_of_a_ratio_are_kept_and_one_of_an_answer(tmp_path: Path) -> None:
    stored(tmp_path, record(FULL), sessions=7)
    assert sessions_of(tmp_path, "decode_speedup") == [f"2026-01-0{day}T00:00:00Z" for day in range(3, 8)]
    assert sessions_of(tmp_path, "perplexity") == ["2026-01-07T00:00:00Z"]
    listed = json.loads(text_of(tmp_path))["sessions"]
    assert list(listed) == sessions_of(tmp_path, "decode_speedup")  # the unused are dropped


def test_the_fingerprint_is_stored_without_its_rates(tmp_path: Path) -> None:
    stored(tmp_path, elsewhere(record(FULL), {**HERE, "arithmetic": {"float32": 1.0}, "cpu": "A"}))
    (session,) = json.loads(text_of(tmp_path))["sessions"].values()
    assert session["machine"] == HERE["machine_class"]
    assert session["fingerprint"] == {"commit": "0" * 40, "cpu": "A", "threads": 2}


def test_each_machine_keeps_its_own_values(tmp_path: Path) -> None:
    here, there = record(ratio(2.0)), elsewhere(record(ratio(3.0)), OTHER_ISA)
    found = store(stored(tmp_path, here, sessions=5), there, "2026-02-01T00:00:00Z")
    assert len(sessions_of(tmp_path, "decode_speedup")) == 6
    for one, center in ((here, 2.0), (there, 3.0)):
        entry = found.entry(one)
        assert entry is not None
        assert entry.metrics["decode_speedup"].same_machine
        assert entry.metrics["decode_speedup"].center == pytest.approx(center)


def test_a_foreign_machine_of_the_same_instruction_set_is_preferred(tmp_path: Path) -> None:
    found = stored(tmp_path, elsewhere(record(ratio(2.0)), SAME_ISA))
    found = store(found, elsewhere(record(ratio(3.0)), OTHER_ISA), "2026-02-01T00:00:00Z")
    entry = found.entry(record(ratio(2.0)))
    assert entry is not None
    history = entry.metrics["decode_speedup"]
    assert (history.center, history.same_machine, history.same_isa) == (2.0, False, True)


def test_an_accepted_regression_starts_a_new_history(tmp_path: Path) -> None:
    found = stored(tmp_path, record(ratio(2.0)), sessions=5)
    slower = record(ratio(1.0))
    assert judged(found, slower).failed
    found = store(found, slower, "2026-02-01T00:00:00Z")
    assert sessions_of(tmp_path, "decode_speedup") == ["2026-02-01T00:00:00Z"]
    assert judged(found, slower).status is Status.PASSED


def test_another_workload_replaces_the_cell(tmp_path: Path) -> None:
    found = stored(tmp_path, record(FULL))
    other = record(ratio(1.5), workload={"prompt": 128})
    found = store(found, other, "2026-02-01T00:00:00Z")
    entry = found.entry(other)
    assert entry is not None
    assert (dict(entry.workload), set(entry.metrics)) == ({"prompt": 128}, {"decode_speedup"})


def test_a_metric_that_is_gone_is_dropped_by_an_update(tmp_path: Path) -> None:
    found = store(stored(tmp_path, record(FULL)), record(ratio(2.0)), "2026-02-01T00:00:00Z")
    assert judged(found, record(ratio(2.0))).status is Status.PASSED


def test_the_center_is_the_median_and_the_bias_shrinks_towards_the_prior(tmp_path: Path) -> None:
    found = stored(tmp_path, record(ratio(2.0)))
    for day, value in ((2, 2.02), (3, 1.98), (4, 2.04)):
        found = store(found, record(ratio(value)), f"2026-01-0{day}T00:00:00Z")
    entry = found.entry(record({}))
    assert entry is not None
    history = entry.metrics["decode_speedup"]
    assert history.center == pytest.approx(2.01)
    assert 0.012 < history.bias < PRIOR_BIAS


def test_the_bias_of_all_ratios_of_a_technique_is_the_prior_of_each(tmp_path: Path) -> None:
    names = ("decode_speedup", "prefill_speedup", "speedup")
    found = baselines.read(tmp_path / "baselines")
    for day in range(1, 5):
        factor = 1.05 if day % 2 else 1.0
        noisy = {name: value for name in names for value in ratio(2.0 * factor, name=name).values()}
        found = store(found, record(noisy), f"2026-01-0{day}T00:00:00Z")
    entry = found.entry(record({}))
    assert entry is not None
    pooled = entry.metrics["speedup"].pooled_bias  # 2.8 % over nine degrees of freedom, the prior over four
    assert pooled == pytest.approx(math.sqrt((4 * PRIOR_BIAS**2 + 9 * 0.0282**2) / 13), rel=0.01)
    assert entry.metrics["speedup"].bias == pytest.approx(
        math.sqrt((4 * pooled**2 + 3 * 0.0282**2) / 7), rel=0.01
    )


def test_a_technique_learns_its_bias_from_other_models_and_a_new_one_from_the_others_of_its_file(
    tmp_path: Path,
) -> None:
    """`restless` moves by 5 % between sessions on one model, `calm` on none; what neither measured is in between."""
    found = baselines.read(tmp_path / "baselines")
    here, there = {"model": "qwen3_4b_instruct_2507"}, {"model": "glm_4_7_flash"}
    for day in range(1, 6):
        moved = 2.0 * (1.05 if day % 2 else 1.0)
        for model, technique, value in (
            (here, "calm", 2.0),
            (there, "restless", moved),
            (there, "calm", 2.0),
        ):
            now = record(ratio(value), optimization=technique, **model)
            found = store(found, now, f"2026-01-0{day}T00:00:00Z")
    found = store(found, record(ratio(2.0), optimization="restless", **here), "2026-01-06T00:00:00Z")
    found = store(found, record(ratio(2.0), optimization="new", **here), "2026-01-07T00:00:00Z")

    def pooled(technique: str) -> float:
        entry = found.entry(record({}, optimization=technique, **here))
        assert entry is not None
        return entry.metrics["decode_speedup"].pooled_bias

    assert pooled("calm") < pooled("new") < PRIOR_BIAS < pooled("restless")


def test_what_optimization_impact_repeats_is_no_further_evidence(tmp_path: Path) -> None:
    alone, twice = (baselines.read(tmp_path / name) for name in ("alone", "twice"))
    for day in range(1, 5):
        value = ratio(2.0 * (1.05 if day % 2 else 1.0))
        stamp = f"2026-01-0{day}T00:00:00Z"
        alone = store(alone, record(value, category="inference_speed"), stamp)
        twice = store(twice, record(value, category="inference_speed"), stamp)
        twice = store(twice, record(value, category="optimization_impact"), stamp)
    biases = []
    for found, category in (
        (alone, "inference_speed"),
        (twice, "inference_speed"),
        (twice, "optimization_impact"),
    ):
        entry = found.entry(record({}, category=category))
        assert entry is not None
        biases.append(entry.metrics["decode_speedup"].pooled_bias)
    assert biases[0] == biases[1] == biases[2] > PRIOR_BIAS


class TestUpdate:
    def measured(self, one: Record) -> list[tuple[Record, object]]:
        return [(one, compare(one, None))]

    def test_a_failing_run_is_refused_and_writes_nothing(self, tmp_path: Path) -> None:
        found = stored(tmp_path, record(ratio(2.0)))
        text = text_of(tmp_path)
        now = record(ratio(1.0))
        with pytest.raises(
            BaselineError, match=r"a failing run never becomes a baseline; 1 failed.*\n  test_x"
        ):
            baselines.update(found, [(now, judged(found, now))], session="s", failures=["test_x"])
        assert text_of(tmp_path) == text

    def test_a_broken_budget_is_refused(self, tmp_path: Path) -> None:
        now = record({"kl_divergence": metric("kl_divergence", 1.0)})
        verdict = compare(now, None, budget={"max_kl_divergence": 0.1})
        found = baselines.read(tmp_path / "baselines")
        with pytest.raises(BaselineError, match="weight_int4/inference_speed"):
            baselines.update(found, [(now, verdict)], session="s")
        assert not (tmp_path / "baselines").exists()

    def test_nothing_measured_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BaselineError, match="no benchmark was measured"):
            baselines.update(baselines.read(tmp_path), [], session="s")

    def test_gone_cells_are_dropped_even_in_another_file(self, tmp_path: Path) -> None:
        old, kept = record(FULL, model="qwen3_vl_2b"), record(FULL)
        found = stored(tmp_path, old, kept)
        written = baselines.update(
            found, [(kept, judged(found, kept))], session="s", gone=[baselines.cell_of(old)]
        )
        assert {path.name for path in written} == {FILE, "qwen3_vl_2b-tiny.json"}
        assert baselines.read(found.directory).entry(old) is None

    def test_other_files_are_not_touched(self, tmp_path: Path) -> None:
        found = stored(tmp_path, record(FULL), record(FULL, model="qwen3_vl_2b"))
        written = baselines.update(found, [(record(FULL), judged(found, record(FULL)))], session="s")
        assert [path.name for path in written] == [FILE]

    def test_a_crash_while_writing_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = stored(tmp_path, record(FULL))
        text = text_of(tmp_path)

        def full_disk(source: str, target: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            store(found, record(ratio(2.0)), "s")
        assert text_of(tmp_path) == text
        assert [path.name for path in found.directory.iterdir()] == [FILE]
