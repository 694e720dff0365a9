"""The constructed initialisation looks back before any training."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pytest_inferencepio.catalog.tiny import TINY, tiny_config
from pytest_inferencepio.tasks.examples import Retrieval
from training.models import new_model
from training.validate import correct


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_an_untrained_model_retrieves(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = new_model(name, seed=1).eval()
    examples = Retrieval((256,)).examples(tokenizer, 8, seed=1)
    assert sum(correct(model, example) for example in examples) >= 6  # chance is 1/16 a piece


def test_a_seed_fixes_the_initialisation() -> None:
    one, two, other = (new_model("glm_4_7_flash", seed) for seed in (3, 3, 4))
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_an_unknown_name_lists_the_four() -> None:
    with pytest.raises(KeyError, match="glm_4_7_flash, qwen3_4b_instruct_2507, qwen3_coder_30b, qwen3_vl_2b"):
        tiny_config("qwen4")
