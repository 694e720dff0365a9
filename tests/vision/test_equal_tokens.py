from __future__ import annotations

import math

import pytest
import torch
from transformers import Qwen2VLImageProcessor
from vision_inputs import image_inputs

from optimizations.runner import Runner
from optimizations.session import optimize
from optimizations.vision.equal_tokens import (
    VARIANTS,
    compare_at_equal_tokens,
    resize_patches,
    smaller_grid,
    with_smaller_images,
)
from optimizations.vision.visual_token_pruning import VisualTokenPruning


@pytest.mark.parametrize(
    ("grid", "ratio", "expected"),
    [((8, 8), 0.25, (4, 4)), ((8, 8), 1.0, (8, 8)), ((4, 8), 0.5, (3, 5)), ((8, 8), 0.001, (1, 1))],
)
def test_smaller_grid(grid: tuple[int, int], ratio: float, expected: tuple[int, int]) -> None:
    found = smaller_grid(*grid, ratio)
    assert sorted(found) == sorted(expected)
    assert math.prod(found) <= max(1, ratio * math.prod(grid))


def test_resized_patches_are_those_of_the_shrunk_image(runner: Runner) -> None:
    """The image processor itself, on the full image and on its area average, is the oracle."""
    image = torch.randint(0, 256, (3, 128, 64), dtype=torch.uint8)
    small = torch.nn.functional.avg_pool2d(image[None].float(), 2)[0]
    settings = {"do_resize": False, "patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
    processor = Qwen2VLImageProcessor(**settings, do_rescale=False, do_normalize=False)
    patches = processor(images=image, return_tensors="pt").pixel_values
    expected = processor(images=small, return_tensors="pt").pixel_values
    found = resize_patches(patches.float(), (16, 8), (8, 4), runner.model.config.vision_config)
    torch.testing.assert_close(found, expected.float())


def test_smaller_images_match_their_placeholders(runner: Runner) -> None:
    inputs = image_inputs([[5, (16, 16), 7, (8, 8), 3]])
    small = with_smaller_images(runner.model.config, inputs, 0.25)
    assert small["image_grid_thw"].tolist() == [[1, 8, 8], [1, 4, 4]]
    assert small["input_ids"].shape == small["attention_mask"].shape == small["mm_token_type_ids"].shape
    assert int((small["input_ids"] == 5).sum()) == 16 + 4
    text = inputs["input_ids"][inputs["input_ids"] != 5]
    assert torch.equal(small["input_ids"][small["input_ids"] != 5], text)
    assert torch.isfinite(runner.forward(**small).logits).all()


def test_comparison_counts_equal_tokens_and_right_answers(runner: Runner) -> None:
    technique = VisualTokenPruning(keep_ratio=0.3)
    examples = []
    for seed in range(3):
        inputs = image_inputs([[5, (16, 16), 7]], seed)
        answer = runner.generate(**inputs, do_sample=False, max_new_tokens=2)[0, -2:].tolist()
        examples.append((inputs, answer))
    found = compare_at_equal_tokens(runner, examples, technique, rounds=2)
    assert found.examples == 3
    assert found.visual_tokens["full"] == 3 * 64
    assert found.visual_tokens["pruned"] == found.visual_tokens["smaller_image"] <= 0.3 * 3 * 64
    assert found.exact_match["full"] == 1.0
    with optimize(runner, VisualTokenPruning(keep_ratio=found.visual_tokens["pruned"] / (3 * 64))):
        right = [
            runner.generate(**inputs, do_sample=False, max_new_tokens=2)[0, -2:].tolist() == answer
            for inputs, answer in examples
        ]
    assert found.exact_match["pruned"] == sum(right) / 3
    assert all(len(found.prefill_seconds[name]) == 2 for name in VARIANTS)
    assert all(seconds > 0 for name in VARIANTS for seconds in found.prefill_seconds[name])
    assert runner.applied == []


def test_inputs_without_an_image_are_an_error(runner: Runner) -> None:
    with pytest.raises(ValueError, match="one row with at least one image is needed, got 2 rows"):
        with_smaller_images(runner.model.config, image_inputs([[4], [5]]), 0.5)
