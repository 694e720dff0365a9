"""Settings of the weight techniques, what they refuse, what does not combine."""

from __future__ import annotations

import re

import pytest

from optimizations.contract import Target
from optimizations.errors import IncompatibleOptimizations, InvalidSpec
from optimizations.registry import compose, parse
from pytest_inferencepio.catalog.tiny import tiny_config

TECHNIQUES = ("weight_int8", "weight_int4", "weight_nf4")


def test_two_formats_do_not_compose():
    for first in (*TECHNIQUES, "weight_lossless"):
        for second in (*TECHNIQUES, "weight_lossless"):
            if first != second:
                with pytest.raises(IncompatibleOptimizations, match="a weight is stored in one format"):
                    compose(parse(first) + parse(second))


@pytest.mark.parametrize("spec", TECHNIQUES)
def test_refusals(spec):
    [part] = parse(spec)
    config = tiny_config("qwen3_4b_instruct_2507")
    assert part.refusal(Target(config)) is None
    assert "its kernels run on CPUs and the model is on cuda" in part.refusal(Target(config, device="cuda"))
    assert "bfloat16 or float32, not float16" in part.refusal(Target(config, dtype="float16"))


def test_lossless_weights_are_bfloat16_ones():
    [part] = parse("weight_lossless")
    config = tiny_config("qwen3_4b_instruct_2507")
    assert part.refusal(Target(config)) is None
    assert "on cuda" in part.refusal(Target(config, device="cuda"))
    assert part.refusal(Target(config, dtype="float32")) == (
        "it holds bfloat16 weights bit for bit, and the model is in float32; use --pio-dtype=bfloat16"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("weight_int4(group_size=7)", "weight_int4: group_size must be one of 32, 64, 128, got 7"),
        ("weight_int8(group_size=true)", "weight_int8: group_size must be one of 32, 64, 128, got True"),
        ("weight_int4(include_lm_head=3)", "weight_int4: include_lm_head must be true or false, got 3"),
        (
            "weight_int8(quantize_embedding=x)",
            "weight_int8: quantize_embedding must be true or false, got 'x'",
        ),
        ("weight_nf4(block_size=32)", "weight_nf4: block_size must be one of 64, 128, 256, got 32"),
        ("weight_nf4(double_quant=1)", "weight_nf4: double_quant must be true or false, got 1"),
        ("weight_int4(bits=3)", "weight_int4 has no setting 'bits'; it has: group_size"),
    ],
)
def test_settings_are_validated_in_words(spec, message):
    with pytest.raises(InvalidSpec, match=re.escape(message)):
        parse(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "weight_int4",
        "weight_int4(group_size=64)",
        "weight_int8(include_lm_head=False)",
        "weight_nf4(double_quant=True)",
    ],
)
def test_specifications_survive_the_round_trip(spec):
    [part] = parse(spec)
    assert part.spec() == spec
    assert parse(part.spec()) == [part]
