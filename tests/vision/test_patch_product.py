"""The patch embedding as a product: the convolution's values, exact undo, nobody else's forward touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all
from optimizations.vision.patch_product import multiply_patches


@pytest.fixture
def embed(vision_model: Any) -> Any:
    return vision_model.model.visual.patch_embed


def pixels(embed: Any, patches: int) -> torch.Tensor:
    return torch.randn(
        patches, embed.proj.weight[0].numel(), generator=torch.Generator().manual_seed(patches)
    )


@pytest.mark.parametrize("patches", [1, 4, 33, 784])
def test_the_product_gives_the_convolutions_values(vision_model: Any, embed: Any, patches: int) -> None:
    exact = copy.deepcopy(embed).double()(pixels(embed, patches).double())
    before = embed(pixels(embed, patches))
    undo = multiply_patches(vision_model)
    after = embed(pixels(embed, patches))
    undo()
    assert after.shape == before.shape
    bound = 4 * torch.finfo(torch.float32).eps * embed.proj.weight[0].numel() ** 0.5 * exact.abs().max()
    assert (after - exact).abs().max() < bound
    assert torch.equal(embed(pixels(embed, patches)), before)  # the undo is exact


def test_pixels_of_another_type_take_the_weights(vision_model: Any, embed: Any) -> None:
    narrow = copy.deepcopy(vision_model.model.visual).bfloat16()
    before = narrow.patch_embed(pixels(embed, 9))
    undo = multiply_patches(narrow)
    after = narrow.patch_embed(pixels(embed, 9))
    undo()
    assert after.dtype == before.dtype == torch.bfloat16
    assert (after - before).abs().max() <= 2**-7 * before.abs().max()  # one unit in the last place


def test_a_forward_that_somebody_else_replaced_stays(vision_model: Any, embed: Any) -> None:
    embed.__dict__["forward"] = theirs = lambda hidden_states: hidden_states
    try:
        multiply_patches(vision_model)()
        assert embed.__dict__["forward"] is theirs
    finally:
        del embed.__dict__["forward"]


@pytest.mark.parametrize("technique", ["native_decoder", "fused_ops"])
def test_techniques_that_use_it_give_it_back(runner: Runner, embed: Any, technique: str) -> None:
    undo = apply_all(runner, parse(technique))
    assert "forward" in embed.__dict__
    undo()
    assert "forward" not in embed.__dict__
