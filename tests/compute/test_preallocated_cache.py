from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from optimizations.compute.preallocated_cache import PreallocatedLayer, preallocated_cache
from pytest_inferencepio.catalog.tiny import tiny_config


def states(tokens: int, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, tokens, 8), torch.randn(rows, 3, tokens, 4)


def test_update_returns_everything_so_far() -> None:
    layer = PreallocatedLayer(16)
    parts = [states(5), states(1), states(3)]
    for index, (keys, values) in enumerate(parts):
        assert layer.get_mask_sizes(keys.shape[2]) == (
            sum(part[0].shape[2] for part in parts[: index + 1]),
            0,
        )
        found = layer.update(keys, values)
    assert torch.equal(found[0], torch.cat([part[0] for part in parts], 2))
    assert torch.equal(found[1], torch.cat([part[1] for part in parts], 2))
    assert layer.get_seq_length() == 9


def test_filled_slots_are_never_contiguous() -> None:
    layer = PreallocatedLayer(4)
    for _ in range(4):
        keys, _ = layer.update(*states(1))
        assert not keys.is_contiguous()


def test_it_grows_past_its_size_and_keeps_its_content() -> None:
    layer = PreallocatedLayer(4)
    first, second = states(4), states(7)
    layer.update(*first)
    storage = layer.keys.data_ptr()
    keys, values = layer.update(*second)
    assert torch.equal(keys, torch.cat([first[0], second[0]], 2))
    assert torch.equal(values, torch.cat([first[1], second[1]], 2))
    assert layer.size >= 11 and layer.keys.data_ptr() != storage


def test_crop_reset_and_reorder() -> None:
    layer = PreallocatedLayer(8)
    keys, values = states(6)
    layer.update(keys, values)
    layer.crop(-2)
    assert torch.equal(layer.filled()[0], keys[:, :, :4])
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.filled()[1], values[[1, 0], :, :4])
    layer.reset()
    assert layer.get_seq_length() == 0
    with pytest.raises(ValueError, match="negative number of tokens to remove, got 2"):
        layer.crop(2)


@pytest.mark.parametrize("name", ["qwen3_4b_instruct_2507", "glm_4_7_flash"])
def test_a_model_computes_the_same_as_with_the_dynamic_cache(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name)).float().eval()
    caches = (preallocated_cache(4, 6), DynamicCache())
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :2] = 0
    ids = torch.randint(8, 1792, (2, 9))
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 9)):
            found, expected = (
                model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
                for cache in caches
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
