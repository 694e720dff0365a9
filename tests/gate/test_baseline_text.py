"""Damaged, foreign and hostile baseline files: one BaselineError each, never another exception."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gate_records import ratio, record, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_inferencepio import baseline_json, baselines
from pytest_inferencepio.baseline_json import BaselineFile, Session, Stored, StoredCell, Value
from pytest_inferencepio.errors import BaselineError
from pytest_inferencepio.record import metric
from pytest_inferencepio.verdict import CellKey

NAME = "qwen3_4b_instruct_2507-tiny.json"
CELL = "weight_int4/inference_speed/cpu/bfloat16"
VALID = """{
 "schema": 1, "model": "m", "scale": "tiny",
 "sessions": {"s": {"machine": "A", "isa": "avx2", "fingerprint": {"cpu": "x"}}},
 "cells": {"o/accuracy/cpu/bfloat16": {"workload": {"n": 1}, "metrics": {
  "perplexity": {"unit": "1", "better": "lower", "values": {"s": {"value": 9.5, "low": 9, "high": 10, "n": 3}}}}}}
}"""


def damaged(change: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads(VALID)
    change(data)
    return json.dumps(data)


def first_metric(data: dict[str, Any]) -> dict[str, Any]:
    return dict(data["cells"]["o/accuracy/cpu/bfloat16"]["metrics"])["perplexity"]  # type: ignore[no-any-return]


DAMAGE: dict[str, tuple[str, str]] = {
    "empty": ("", "not valid JSON"),
    "truncated": (VALID[: len(VALID) // 2], "not valid JSON"),
    "binary": ("\x00\x01", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "nan": (VALID.replace("9.5", "NaN"), "NaN is not a number"),
    "infinite": (VALID.replace("9.5", "1e999"), "a number is not finite"),
    "huge": (VALID.replace("9.5", "1" + "0" * 400), "a number is not finite"),
    "list": ("[]", "the file is a list, not a mapping"),
    "other schema": (VALID.replace('"schema": 1', '"schema": 2'), "has schema 2, this version reads 1"),
    "boolean schema": (VALID.replace('"schema": 1', '"schema": true'), "has schema True"),
    "no schema": (damaged(lambda data: data.pop("schema")), "has schema None"),
    "foreign": ('{"machine_info": {}, "benchmarks": []}', "has schema None"),
    "no model": (damaged(lambda data: data.pop("model")), "model is None, not a text"),
    "no cells": (damaged(lambda data: data.pop("cells")), "cells is a NoneType, not a mapping"),
    "cell name": (VALID.replace("o/accuracy/cpu", "o"), "is not named optimization/category/device/dtype"),
    "cell list": (VALID.replace('{"workload": {"n": 1},', '{"workload": [],'), "workload is a list"),
    "better": (VALID.replace('"lower"', '"smaller"'), "better is 'smaller', not one of higher, lower"),
    "no unit": (damaged(lambda data: first_metric(data).pop("unit")), "unit is None, not a text"),
    "no values": (
        VALID.replace('{"s": {"value": 9.5, "low": 9, "high": 10, "n": 3}}', "{}"),
        "there are no values",
    ),
    "text value": (VALID.replace("9.5", '"9.5"'), "'9.5' is not a number"),
    "boolean value": (VALID.replace("9.5", "true"), "True is not a number"),
    "negative count": (VALID.replace('"n": 3', '"n": -3'), "n is -3, not a count"),
    "fractional count": (VALID.replace('"n": 3', '"n": 3.5'), "n is 3.5, not a count"),
    "examples": (VALID.replace('"n": 3', '"examples": "12"'), "examples must be a text of 0 and 1"),
    "unknown session": (VALID.replace('"values": {"s"', '"values": {"t"'), "session 't' is not among"),
    "session": (VALID.replace('"isa": "avx2"', '"isa": 3'), "isa is 3, not a text"),
}


def test_the_undamaged_text_is_read() -> None:
    file = baseline_json.loads(VALID, "x.json")
    assert file.cells[CellKey("m", "tiny", "o", "accuracy", "cpu", "bfloat16")].workload == {"n": 1}


@pytest.mark.parametrize("text", [text for text, _ in DAMAGE.values()], ids=list(DAMAGE))
def test_each_damage_has_its_message(text: str) -> None:
    expected = next(message for other, message in DAMAGE.values() if other == text)
    with pytest.raises(BaselineError) as error:
        baseline_json.loads(text, "x.json")
    assert "baseline x.json" in str(error.value)
    assert expected in str(error.value)
    assert "--pio-update-baseline" in str(error.value)


def test_a_file_under_another_name(tmp_path: Path) -> None:
    found = stored(tmp_path, record(ratio(2.0)))
    (found.directory / NAME).rename(found.directory / "qwen3_vl_2b-tiny.json")
    with pytest.raises(BaselineError, match=f"belongs into {NAME}; rename it"):
        baselines.read(found.directory)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BaselineError, match="cannot read baseline"):
        baselines.read(tmp_path)


def test_a_directory_of_that_name(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(BaselineError, match="cannot read baseline"):
        baselines.read(tmp_path)


@pytest.fixture(scope="module")
def real_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("real")
    full = {**ratio(2.0, noise=0.01), "task_exact_match": metric("task_exact_match", 1.0, samples=(1.0,))}
    found = stored(where, record(full), record(full, optimization="kv_int8"), sessions=3)
    return (found.directory / NAME).read_text()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_mutated_file_is_read_or_refused(real_text: str, data: st.DataObject) -> None:
    """Bytes deleted, doubled or replaced at random places: a BaselineFile or a BaselineError, nothing else."""
    text = real_text
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 20))
        text = (
            text[:start]
            + data.draw(st.text(max_size=5) | st.sampled_from(list('{}[]",:-.0eN')))
            + text[start + length :]
        )
    try:
        file = baseline_json.loads(text, "x.json")
    except BaselineError:
        return
    assert isinstance(file, BaselineFile)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_value_in_any_place_is_read_or_refused(real_text: str, data: st.DataObject) -> None:
    tree = json.loads(real_text)
    node: Any = tree
    while True:  # walk down to a random place and put a random value there
        key = data.draw(st.sampled_from(sorted(node)))
        if not isinstance(node[key], dict) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(JSON)
    try:
        file = baseline_json.loads(json.dumps(tree), "x.json")
    except BaselineError:
        return
    assert baseline_json.loads(baseline_json.dumps(file), "x.json") == file


NAMES = st.text("abc_()=,.0123456789é", min_size=1, max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False).map(baseline_json.rounded)
VALUES = st.builds(
    Value, NUMBERS, st.none() | NUMBERS, st.none() | NUMBERS, st.integers(0, 10**6), st.text("01", max_size=6)
)


@st.composite
def files(draw: st.DrawFn) -> BaselineFile:
    sessions = draw(
        st.dictionaries(NAMES, st.builds(Session, NAMES, NAMES, st.just({"cpu": "é"})), min_size=1)
    )
    values = st.dictionaries(st.sampled_from(sorted(sessions)), VALUES, min_size=1)
    metrics = st.builds(Stored, NAMES, st.sampled_from(("higher", "lower")), values)
    keys = st.builds(CellKey, st.just("m"), st.just("tiny"), NAMES, NAMES, NAMES, NAMES)
    cells = st.builds(
        StoredCell, st.just({"prompt": 3, "list": [1, 2.5]}), st.dictionaries(NAMES, metrics, max_size=3)
    )
    return BaselineFile("m", "tiny", sessions, draw(st.dictionaries(keys, cells, max_size=3)))


@given(file=files())
@settings(deadline=None)
def test_every_file_survives_writing_and_reading(file: BaselineFile) -> None:
    assert baseline_json.loads(baseline_json.dumps(file), "x.json") == file
