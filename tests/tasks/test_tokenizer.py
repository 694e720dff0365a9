"""The shipped tokenizer: lossless, digits singly, symbols and control tokens one token each."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pytest_inferencepio.catalog.tiny import IMAGE_ID, TINY, VISION_START_ID, VOCABULARY, reference_directory
from pytest_inferencepio.tasks.symbols import CONTROL_TOKENS, SYMBOLS

TOKENIZER = AutoTokenizer.from_pretrained(reference_directory("qwen3_4b_instruct_2507"))


@given(st.text(max_size=80))
def test_text_survives_the_round_trip(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < VOCABULARY for token in ids)


@given(st.integers(0, 10**9))
def test_digits_are_single_tokens(number: int) -> None:
    assert TOKENIZER.tokenize(str(number)) == list(str(number))


@pytest.mark.parametrize("token", [*CONTROL_TOKENS, *SYMBOLS])
def test_task_tokens_are_one_token(token: str) -> None:
    assert len(TOKENIZER("x" + token + "y", add_special_tokens=False)["input_ids"]) == 3


def test_vision_tokens_have_the_ids_of_the_configuration() -> None:
    assert TOKENIZER.convert_tokens_to_ids("<|image_pad|>") == IMAGE_ID
    assert TOKENIZER.convert_tokens_to_ids("<|vision_start|>") == VISION_START_ID


def test_chat_template_marks_turns_and_images() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "shape?"}]
    text = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert re.fullmatch(
        r"<\|im_start\|>user\n<\|vision_start\|><\|image_pad\|><\|vision_end\|>shape\?<\|im_end\|>\n"
        r"<\|im_start\|>assistant\n",
        text,
    )


@pytest.mark.parametrize("name", TINY)
def test_every_directory_ships_the_same_vocabulary(name: str) -> None:
    other = AutoTokenizer.from_pretrained(reference_directory(name))
    assert other.get_vocab() == TOKENIZER.get_vocab()
    assert other.eos_token_id == 0
