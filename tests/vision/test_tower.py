"""The vision tower: the convolution's values as a product, transformers' bits in the rotation, exact undo."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from vision_inputs import PATCH_VALUES

from optimizations.errors import Refusal
from optimizations.forwards import replace_forwards
from optimizations.native.dense_attention import attend_dense
from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all
from optimizations.vision import tower
from optimizations.vision.tower import TOWER


def pixels(patches: int) -> torch.Tensor:
    return torch.randn(patches, PATCH_VALUES, generator=torch.Generator().manual_seed(patches))


def features(visual: Any, grids: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    """What the tower gives the decoder: merged patches and DeepStack's."""
    patches = sum(frames * height * width for frames, height, width in grids)
    dtype = visual.patch_embed.proj.weight.dtype
    with torch.inference_mode():
        out = visual(pixels(patches).to(dtype), grid_thw=torch.tensor(grids))
    return [out.pooler_output, *out.deepstack_features]


@pytest.mark.parametrize("patches", [1, 4, 33, 784])
@torch.inference_mode()
def test_the_product_gives_the_convolutions_values(vision_model: Any, patches: int) -> None:
    embed = vision_model.model.visual.patch_embed
    exact = copy.deepcopy(embed).double()(pixels(patches).double())
    before = embed(pixels(patches))
    undo = replace_forwards(vision_model, TOWER, "this")
    after = embed(pixels(patches))
    undo()
    assert after.shape == before.shape
    bound = 4 * torch.finfo(torch.float32).eps * PATCH_VALUES**0.5 * exact.abs().max()
    assert (after - exact).abs().max() < bound
    assert torch.equal(embed(pixels(patches)), before)  # the undo is exact


@torch.inference_mode()
def test_pixels_of_another_type_take_the_weights(vision_model: Any) -> None:
    narrow = copy.deepcopy(vision_model.model.visual).bfloat16()
    before = narrow.patch_embed(pixels(9))
    undo = replace_forwards(narrow, TOWER, "this")
    after = narrow.patch_embed(pixels(9))
    undo()
    assert after.dtype == before.dtype == torch.bfloat16
    assert (after - before).abs().max() <= 2**-7 * before.abs().max()  # one unit in the last place


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("grids", [[(1, 4, 6)], [(1, 2, 2), (1, 8, 4), (3, 2, 4)]])
def test_features_of_images_and_videos_are_transformers(
    vision_model: Any, grids: list[tuple[int, int, int]], attention: str, isa: str
) -> None:
    """Several images do not see each other, whoever does the attention."""
    visual = copy.deepcopy(vision_model.model.visual)
    visual.set_attn_implementation(attention)
    before = features(visual, grids)
    undo = replace_forwards(visual, TOWER, "this")
    after = features(visual, grids)
    undo()
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())
    assert all(map(torch.equal, before, features(visual, grids)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_kernel_takes_the_place_of_sdpa_where_it_is_faster(
    vision_model: Any, attention: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches: list[int] = []

    def seen(q: torch.Tensor, *others: Any) -> torch.Tensor:
        patches.append(q.shape[2])
        return attend_dense(q, *others)

    monkeypatch.setattr(tower, "attend_dense", seen)
    visual = copy.deepcopy(vision_model.model.visual)
    visual.set_attn_implementation(attention)
    undo = replace_forwards(visual, TOWER, "this")
    features(visual, [(1, 4, 4), (1, 2, 4)])
    undo()
    assert patches == ([16, 8] * len(visual.blocks) if (attention, isa) == ("sdpa", "avx512") else [])


def test_bfloat16_features_are_as_far_from_float32_as_transformers(vision_model: Any) -> None:
    grids = [(1, 8, 8), (1, 6, 4)]
    exact = features(vision_model.model.visual, grids)
    narrow = copy.deepcopy(vision_model.model.visual).bfloat16()
    before = features(narrow, grids)
    undo = replace_forwards(narrow, TOWER, "this")
    after = features(narrow, grids)
    undo()
    for wanted, stock, ours in zip(exact, before, after, strict=True):
        assert (ours - wanted).norm() <= 1.1 * (stock - wanted).norm()


def test_gradients_are_transformers(vision_model: Any) -> None:
    embed = vision_model.model.visual.patch_embed
    undo = replace_forwards(vision_model, TOWER, "this")
    embed(pixels(4)).sum().backward()
    undo()
    replaced, embed.proj.weight.grad = embed.proj.weight.grad, None
    embed(pixels(4)).sum().backward()
    original, embed.proj.weight.grad = embed.proj.weight.grad, None
    assert replaced is not None
    assert torch.equal(replaced, original)


def test_a_forward_that_somebody_else_replaced_is_refused_and_stays(vision_model: Any) -> None:
    blocks = vision_model.model.visual.blocks
    blocks[1].attn.__dict__["forward"] = theirs = lambda hidden_states: hidden_states
    try:
        with pytest.raises(
            Refusal,
            match=r"blocks\.1\.attn has already been replaced by something else; apply native_decoder first",
        ):
            replace_forwards(vision_model, TOWER, "native_decoder")
        assert blocks[1].attn.__dict__["forward"] is theirs
        assert not any("forward" in module.__dict__ for module in blocks[0].modules())
    finally:
        del blocks[1].attn.__dict__["forward"]


@pytest.mark.parametrize("technique", ["native_decoder", "fused_ops"])
def test_techniques_that_use_it_give_it_back(runner: Runner, technique: str) -> None:
    visual = runner.model.model.visual
    undo = apply_all(runner, parse(technique))
    replaced = {type(m).__name__ for m in visual.modules() if "forward" in m.__dict__}
    undo()
    assert replaced == set(TOWER)
    assert not any("forward" in module.__dict__ for module in visual.modules())
