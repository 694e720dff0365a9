"""The baseline that visual token pruning must beat: a smaller image with as many tokens as survive pruning."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import interpolate

from optimizations.session import optimize
from optimizations.vision.pruned_prefill import runs
from optimizations.vision.visual_token_pruning import VisualTokenPruning

if TYPE_CHECKING:
    from optimizations.runner import Runner

Inputs = dict[str, torch.Tensor]
VARIANTS = ("full", "pruned", "smaller_image")
MAX_DISTORTION = 1.5  # of the aspect ratio; beyond it the baseline would lose for its shape, not its size


@dataclasses.dataclass(frozen=True)
class EqualTokenComparison:
    """Full image, pruned image and smaller image on the same questions; each mapping is keyed by `VARIANTS`.

    `visual_tokens` counts tokens in the text tower over all examples, `exact_match` is the fraction of greedy
    answers that are right, `prefill_seconds` holds one sample per round: vision tower and prefill of one example.
    """

    examples: int
    visual_tokens: dict[str, int]
    exact_match: dict[str, float]
    prefill_seconds: dict[str, tuple[float, ...]]


def compare_at_equal_tokens(
    runner: Runner,
    examples: Sequence[tuple[Inputs, Sequence[int]]],
    technique: VisualTokenPruning,
    rounds: int = 5,
) -> EqualTokenComparison:
    """Answer every example three ways and time the prefill of the first, interleaved.

    Args:
        runner: an unoptimized vision-language model.
        examples: (inputs of one row with `pixel_values` and `image_grid_thw`, token ids of the right answer).
        technique: `keep_ratio` is lowered per example to what a smaller image can reach exactly.
        rounds: timed rounds after one warm-up round.
    """
    prepared = [(_variants(runner.model.config, inputs, technique), answer) for inputs, answer in examples]
    tokens, right = dict.fromkeys(VARIANTS, 0), dict.fromkeys(VARIANTS, 0)
    for (variants, part), answer in prepared:
        for name, inputs in variants.items():
            with _applied(runner, name, part):
                right[name] += _answers(runner, inputs, answer)
            images = runs(inputs["input_ids"] == runner.model.config.image_token_id)
            sizes = [end - start for _, start, end in images]
            tokens[name] += sum(map(part.kept_tokens, sizes)) if name == "pruned" else sum(sizes)
    samples: dict[str, list[float]] = {name: [] for name in VARIANTS}
    (variants, part), _ = prepared[0]
    for turn in range(rounds + 1):
        for name in VARIANTS[turn % 3 :] + VARIANTS[: turn % 3]:
            with _applied(runner, name, part):
                samples[name].append(_prefill_seconds(runner, variants[name]))
    return EqualTokenComparison(
        examples=len(examples),
        visual_tokens=tokens,
        exact_match={name: count / len(examples) for name, count in right.items()},
        prefill_seconds={name: tuple(values[1:]) for name, values in samples.items()},
    )


def smaller_grid(height: int, width: int, keep_ratio: float) -> tuple[int, int]:
    """The largest grid of visual tokens with at most `keep_ratio` of height × width and about its shape."""
    best = (1, 1)
    for rows in range(1, height + 1):
        for columns in range(1, width + 1):
            fits = rows * columns <= max(1, keep_ratio * height * width)
            distortion = abs(math.log(rows * width / (columns * height)))
            if fits and distortion <= math.log(MAX_DISTORTION) and rows * columns > best[0] * best[1]:
                best = (rows, columns)
    return best


def with_smaller_images(config: Any, inputs: Inputs, keep_ratio: float) -> Inputs:
    """`inputs` (one row) with every image shrunk by area averaging, placeholders removed to match.

    Raises:
        ValueError: more than one row, or no image.
    """
    ids = inputs["input_ids"]
    if len(ids) != 1 or "pixel_values" not in inputs:
        raise ValueError(f"one row with at least one image is needed, got {len(ids)} rows: {sorted(inputs)}")
    merge = config.vision_config.spatial_merge_size
    grids = inputs["image_grid_thw"].tolist()
    patches = inputs["pixel_values"].split([math.prod(grid) for grid in grids])
    small = [smaller_grid(height // merge, width // merge, keep_ratio) for _, height, width in grids]
    keep = torch.ones_like(ids[0], dtype=torch.bool)
    for (_, start, end), (rows, columns) in zip(runs(ids == config.image_token_id), small, strict=True):
        keep[start + rows * columns : end] = False
    resized = [
        resize_patches(values, tuple(grid[1:]), (rows * merge, columns * merge), config.vision_config)
        for values, grid, (rows, columns) in zip(patches, grids, small, strict=True)
    ]
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {
        **inputs,
        **{name: inputs[name][:, keep] for name in per_token if name in inputs},
        "pixel_values": torch.cat(resized),
        "image_grid_thw": torch.tensor([[1, rows * merge, columns * merge] for rows, columns in small]),
    }


def resize_patches(
    patches: torch.Tensor, grid: tuple[int, ...], target: tuple[int, int], vision: Any
) -> torch.Tensor:
    """Shrink one image given as patches.

    Args:
        patches: [height·width, channels·temporal·side²] in the order of Qwen-VL image processors: blocks of
            merge × merge patches.
        grid, target: (height, width) in patches, multiples of the merge size.
    """
    side, merge, depth = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    height, width = grid
    blocks = patches.view(height // merge, width // merge, merge, merge, -1, side, side)
    image = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, -1, height * side, width * side)
    size = (target[0] * side, target[1] * side)
    small = interpolate(image.float(), size=size, mode="area").to(patches.dtype)
    parts = small.view(-1, target[0] // merge, merge, side, target[1] // merge, merge, side)
    return parts.permute(1, 4, 2, 5, 0, 3, 6).reshape(
        target[0] * target[1], vision.in_channels * depth * side**2
    )


def _variants(
    config: Any, inputs: Inputs, technique: VisualTokenPruning
) -> tuple[dict[str, Inputs], VisualTokenPruning]:
    small = with_smaller_images(config, inputs, technique.keep_ratio)
    kept = int((small["input_ids"] == config.image_token_id).sum())
    ratio = kept / int((inputs["input_ids"] == config.image_token_id).sum())
    equal = dataclasses.replace(technique, keep_ratio=ratio)
    return {"full": inputs, "pruned": inputs, "smaller_image": small}, equal


def _applied(runner: Runner, name: str, part: VisualTokenPruning) -> AbstractContextManager[Any]:
    return optimize(runner, part) if name == "pruned" else nullcontext()


def _answers(runner: Runner, inputs: Inputs, answer: Sequence[int]) -> bool:
    count = len(answer)
    ids = runner.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)
    return ids[0, -count:].tolist() == list(answer)


def _prefill_seconds(runner: Runner, inputs: Inputs) -> float:
    start = time.perf_counter()
    logits = runner.forward(**inputs, logits_to_keep=1, use_cache=True).logits
    logits[0, -1, 0].item()  # waits for the device
    return time.perf_counter() - start
