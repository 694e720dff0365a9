"""The record: its JSON round trip and the message of every way to break it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_inferencepio.errors import RecordError
from pytest_inferencepio.record import (
    METRICS,
    SCHEMA,
    Metric,
    Record,
    keyed,
    metric,
    not_measured,
    parts_of,
)


def example(**changed: Any) -> Record:
    fields: dict[str, Any] = {
        "model": "qwen3_4b_instruct_2507",
        "scale": "tiny",
        "optimization": "weight_int4(group_size=64)+kv_int8",
        "category": "inference_speed",
        "device": "cpu",
        "dtype": "bfloat16",
        "workload": {"prompt": 64, "lengths": [1, 2]},
        "metrics": {
            "speedup": metric("speedup", 2.0, 1.9, 2.1, 9, (1.9, 2.0, 2.1)),
            "energy_per_token": not_measured("energy_per_token", "no counter is readable"),
        },
        "fingerprint": {"cpu": "x", "threads": 2},
        "notes": ("fell back to eager",),
    }
    return Record(**{**fields, **changed})


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def metrics(draw: st.DrawFn) -> tuple[str, Metric]:
    name = draw(st.sampled_from(sorted(METRICS)))
    if draw(st.booleans()):
        return name, not_measured(name, draw(st.text(min_size=1)))
    low, value, high = sorted(draw(st.tuples(NUMBERS, NUMBERS, NUMBERS)))
    samples = tuple(draw(st.lists(NUMBERS, max_size=4)))
    return name, metric(name, value, low, high, draw(st.integers(1, 99)), samples)


@settings(deadline=None)
@given(found=st.lists(metrics(), max_size=4).map(dict), notes=st.lists(st.text(), max_size=2).map(tuple))
def test_a_record_survives_json(found: dict[str, Metric], notes: tuple[str, ...]) -> None:
    one = example(metrics=found, notes=notes)
    assert Record.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False))) == one


def test_the_json_holds_what_other_programs_look_for() -> None:
    plain = example().to_json()
    assert plain["schema"] == SCHEMA
    assert plain["metrics"]["speedup"] == {
        "value": 2.0,
        "low": 1.9,
        "high": 2.1,
        "n": 9,
        "unit": "1",
        "better": "higher",
        "reason": None,
        "samples": [1.9, 2.0, 2.1],
    }
    assert plain["verdict"] == "no_baseline"


def test_a_cell_is_addressed_by_names_only() -> None:
    assert example().cell == "qwen3_4b_instruct_2507/tiny/weight_int4(group_size=64)+kv_int8/inference_speed"


def test_units_are_si_and_directions_known() -> None:
    assert {unit for unit, _ in METRICS.values()} <= {"s", "B", "J", "1", "1/s", "B/s", "nat"}
    assert {better for _, better in METRICS.values()} == {"higher", "lower"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: metric("speed", 1.0), "unknown metric 'speed'; add it to record.METRICS"),
        (lambda: not_measured("speed", "x"), "unknown metric 'speed'"),
        (lambda: metric("speedup", math.nan), "a metric must be finite, got nan 1"),
        (lambda: metric("total_time", math.inf), "a metric must be finite, got inf s"),
        (lambda: metric("speedup", 1.0, 1.5, 2.0), "interval [1.5, 2.0] does not hold its value 1.0"),
        (lambda: metric("speedup", 1.0, math.nan, 2.0), "does not hold its value"),
        (lambda: not_measured("speedup", ""), "needs the reason why it was not measured"),
        (lambda: Metric(1.0, None, None, 1, "1", "bigger"), "better must be one of ('higher', 'lower')"),
        (lambda: metric("speedup", 1.0, samples=(math.nan,)), "samples of a metric must be finite"),
        (lambda: metric("speedup", 1.0, n=-1), "n must be a count, got -1"),
    ],
)
def test_a_metric_that_breaks_the_schema(make: Any, message: str) -> None:
    with pytest.raises(RecordError) as error:
        make()
    assert message in str(error.value)


def changed(**values: Any) -> dict[str, Any]:
    return {**example().to_json(), **values}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "a record is a mapping, got NoneType"),
        ([], "a record is a mapping, got list"),
        ({}, "record schema None is not 1; measure again"),
        (changed(schema=99), "record schema 99 is not 1"),
        (changed(extra=1), "missing [], unknown ['extra']"),
        ({"schema": SCHEMA}, "missing ['category',"),
        (changed(metrics=[]), "metrics must be a mapping, got list"),
        (changed(workload=[]), "workload must be a mapping, got list"),
        (changed(fingerprint=None), "fingerprint must be a mapping, got NoneType"),
        (changed(model=3), "model must be a text, got int"),
        (changed(notes="one"), "notes must be a list of texts"),
        (changed(notes=[1]), "notes must be a list of texts"),
        (changed(metrics={"speedup": 1.0}), "metric 'speedup' must be a mapping, got float"),
        (changed(metrics={"speedup": {"value": 1.0}}), "metric 'speedup' does not fit the schema"),
        (
            changed(metrics={"speedup": {**example().to_json()["metrics"]["speedup"], "value": "2"}}),
            "metric 'speedup': value must be a number, got str",
        ),
        (
            changed(metrics={"speedup": {**example().to_json()["metrics"]["speedup"], "samples": 3}}),
            "metric 'speedup' does not fit the schema",
        ),
        (
            changed(metrics={"speedup": {**example().to_json()["metrics"]["speedup"], "samples": ["a"]}}),
            "metric 'speedup': samples must be numbers",
        ),
    ],
)
def test_a_foreign_record(data: Any, message: str) -> None:
    with pytest.raises(RecordError) as error:
        Record.from_json(data)
    assert message in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(key=st.sampled_from(sorted(example().to_json())), value=JSON)
def test_any_value_of_a_key_is_read_or_refused(key: str, value: Any) -> None:
    try:
        one = Record.from_json(changed(**{key: value}))
    except RecordError:
        return
    assert Record.from_json(json.loads(json.dumps(one.to_json()))) == one


@settings(deadline=None)
@given(key=st.sampled_from(["value", "low", "high", "n", "unit", "better", "reason", "samples"]), value=JSON)
def test_any_value_in_a_metric_is_read_or_refused(key: str, value: Any) -> None:
    plain = {**example().to_json()["metrics"]["speedup"], key: value}
    try:
        Record.from_json(changed(metrics={"speedup": plain}))
    except RecordError:
        pass


def test_records_are_compared_and_reported_without_torch() -> None:
    modules = "comparison, baselines, gate_run, record, machine"
    reports = "terminal, files, markdown, json_report, coverage"
    code = (
        f"import sys; from pytest_inferencepio import {modules}; from pytest_inferencepio.reports import {reports}; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'pytest') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestKeyedMetrics:
    def test_a_key_keeps_the_unit_and_direction_of_its_name(self) -> None:
        name = keyed("read_bandwidth", "16MiB")
        assert name == "read_bandwidth[16MiB]"
        assert parts_of(name) == ("read_bandwidth", "16MiB")
        assert parts_of("read_bandwidth") == ("read_bandwidth", "")
        value = metric(name, 1e9)
        assert (value.unit, value.better) == ("B/s", "higher")

    @pytest.mark.parametrize("name", ["reed_bandwidth[16MiB]", "read_bandwidth[]", "read_bandwidth[a][b]"])
    def test_what_is_not_a_metric_with_a_key_is_unknown(self, name: str) -> None:
        with pytest.raises(RecordError, match="unknown metric"):
            metric(name, 1.0)
