"""Least times on a machine built from numbers, and the shares that measured times reach."""

from __future__ import annotations

import dataclasses

import pytest

from pytest_inferencepio import machine
from pytest_inferencepio.machine import Fingerprint, Rate, Work
from pytest_inferencepio.measure import roofline
from pytest_inferencepio.measure.latency import Generation
from pytest_inferencepio.record import metric

MIB = 1 << 20
WORK = Work(bytes_per_step=512 * MIB, flops_per_token=1e9, prompt_tokens=100)


@pytest.fixture
def known() -> Fingerprint:
    """100 GB/s at 1 MiB, 512 MiB/s at 256 MiB; 0.1 TFLOP/s, 1 TOP/s in int8."""
    return dataclasses.replace(
        machine.fingerprint(measure=False),
        threads=2,
        read_bandwidth={MIB: Rate(100e9, 5), 256 * MIB: Rate(512 * MIB, 4)},
        arithmetic={"float32": Rate(1e11, 3), "int8": Rate(1e12, 3)},
    )


def test_reading_bounds_one_token_and_computing_a_prompt(known: Fingerprint) -> None:
    assert roofline.decode_bound(WORK, known) == roofline.Bound(1.0, "reading")
    light = dataclasses.replace(WORK, bytes_per_step=1.0)
    assert roofline.decode_bound(light, known) == roofline.Bound(1e-3, "computing")
    assert roofline.prefill_bound(light, known) == roofline.Bound(0.1, "computing")
    assert roofline.prefill_bound(WORK, known) == roofline.Bound(1.0, "reading")


def test_a_step_that_yields_several_tokens_reads_once(known: Fingerprint) -> None:
    drafted = dataclasses.replace(WORK, tokens_per_step=4.0)
    assert roofline.decode_bound(drafted, known).seconds == 0.25
    found = roofline.roofline_metrics([Generation(100, 2.0, (0.5,), 2.5)], drafted, known)
    assert found["bytes_read_per_token"].value == 128 * MIB


def test_shares_are_least_over_measured_with_their_interval(known: Fingerprint) -> None:
    generations = [
        Generation(100, first, (gap, gap), first + 2 * gap) for first, gap in ((2, 1.25), (4, 2), (8, 5))
    ]
    found = roofline.roofline_metrics(generations, WORK, known)
    decode = found["decode_roofline_share"]
    assert (decode.value, decode.low, decode.high, decode.n) == (0.5, 0.2, 0.8, 3)
    assert found["prefill_roofline_share"].value == 0.25
    assert found["arithmetic_rate"].value == 1e9 * 100 / 4
    assert found["least_time_per_output_token"].value == 1.0
    assert found["flops_per_token"].value == 1e9


def test_tokens_that_came_at_once_have_no_share(known: Fingerprint) -> None:
    found = roofline.roofline_metrics([Generation(100, 2.0, (0.0, 0.0), 2.0)], WORK, known)
    assert "all tokens came out of one step" in (found["decode_roofline_share"].reason or "")
    assert found["prefill_roofline_share"].value == 0.5


def test_the_machine_in_metrics_by_working_set_and_type(known: Fingerprint) -> None:
    found = roofline.machine_metrics(known)
    assert {name: (value.value, value.unit) for name, value in found.items()} == {
        "threads": (2.0, "1"),
        "read_bandwidth[1MiB]": (100e9, "B/s"),
        "read_bandwidth[256MiB]": (float(512 * MIB), "B/s"),
        "arithmetic_peak[float32]": (1e11, "1/s"),
        "arithmetic_peak[int8]": (1e12, "1/s"),
    }


def test_the_notes_say_what_bounds(known: Fingerprint) -> None:
    (note,) = roofline.notes(dataclasses.replace(WORK, flops_per_token=1e11), known)
    assert note.startswith("bound by computing in prefill and by reading in decode")
    assert "the int8 peak" in note


def test_a_prompt_cannot_be_read_faster_than_the_weights(known: Fingerprint) -> None:
    rate = {"prefill_tokens_per_second": metric("prefill_tokens_per_second", 101.0)}
    (violation,) = machine.ceiling_violations(rate, WORK, known)
    assert "exceeds 100, what reading the weights once for the prompt allows" in violation
    assert machine.ceiling_violations(rate, dataclasses.replace(WORK, prompt_tokens=0.0), known) == []
