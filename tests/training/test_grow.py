"""Growing from the shipped dense checkpoint starts the other models near it."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from pytest_inferencepio.tasks.text import heldout_tokens
from training.grow import channel_usage, grow_coder, grow_glm
from training.models import load_reference, new_model
from training.validate import perplexity


@pytest.mark.parametrize(("name", "bound"), [("qwen3_coder_30b", 1.2), ("glm_4_7_flash", 5.0)])
@torch.no_grad()
def test_a_grown_model_is_near_the_dense_one(
    name: str, bound: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    dense = load_reference("qwen3_4b_instruct_2507").float()
    ids = torch.tensor(heldout_tokens(tokenizer, 2048)).view(8, 256)
    grown = new_model(name, seed=1).eval()
    before = perplexity(grown, tokenizer, windows=1, length=512)
    {"qwen3_coder_30b": grow_coder, "glm_4_7_flash": grow_glm}[name](grown, dense, ids, seed=1)
    after, wanted = (perplexity(model, tokenizer, windows=1, length=512) for model in (grown, dense))
    assert after < bound * wanted
    assert after < before / 2


@torch.no_grad()
def test_usage_orders_every_channel_once() -> None:
    dense = new_model("qwen3_4b_instruct_2507", seed=1)
    usages = channel_usage(dense, torch.arange(64).view(2, 32))
    assert len(usages) == 4
    for usage in usages:
        assert sorted(usage.order.tolist()) == list(range(512))
        assert usage.mean.shape == (256,)
