"""From a catalog entry and a scale to a `Runner`: reference checkpoint, named checkpoint, or random weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimizations.contract import Optimization, Target
from optimizations.errors import Refusal
from optimizations.registry import spec_of
from optimizations.runner import Runner
from pytest_inferencepio.catalog.checkpoints import check_loaded, resolve_checkpoint, validate_checkpoint
from pytest_inferencepio.catalog.configs import full_config, meta_model, model_class
from pytest_inferencepio.catalog.entries import SCALES, ModelEntry
from pytest_inferencepio.catalog.memory import MERGING_COPIES, check_memory
from pytest_inferencepio.catalog.processors import load_processor
from pytest_inferencepio.catalog.random_weights import materialize, original_parameters
from pytest_inferencepio.catalog.tiny import reference_directory
from pytest_inferencepio.errors import UnknownName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of Qwen3-VL's preprocessor: an image is scaled to lie between them. The tiny reference's limit is 256 x 256.
_PUBLISHED_PIXELS = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
_VISION_TOKENS = {  # name in the configuration -> attribute of the processor
    "image_token_id": "image_token_id",
    "video_token_id": "video_token_id",
    "vision_start_token_id": "vision_start_token_id",
    "vision_end_token_id": "vision_end_token_id",
}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    `source` is "reference", "random" or the path of the checkpoint; `seconds` is what loading took (conversion
    while loading included); `notes` are sentences for the report.
    """

    runner: Runner
    entry: ModelEntry
    scale: str
    source: str
    seconds: float
    notes: tuple[str, ...] = ()


def load(
    entry: ModelEntry,
    scale: str,
    *,
    device: str = "cpu",
    dtype: str = "bfloat16",
    checkpoint: str | None = None,
    optimizations: Sequence[Optimization] = (),
    seed: int = 0,
) -> Loaded:
    """Load `entry` at `scale`.

    Args:
        device, dtype: where the weights live and as what ("bfloat16", "float32", "float16").
        checkpoint: directory or hub id for the full scale; None takes random weights. At the tiny scale None
            takes the reference checkpoint.
        optimizations: at the full scale those that convert while loading are converted tensor by tensor, so
            that the unconverted model never exists; the caller applies all of them afterwards (those already
            converted change nothing).

    Raises:
        UnknownName: a scale that does not exist.
        NotEnoughMemory: before anything is allocated, with what is missing and what would fit.
        CheckpointError: a checkpoint of another model, truncated, or without tokenizer.
        Refusal: a technique that converts while loading refuses this model.
    """
    if scale not in SCALES:
        raise UnknownName(f"unknown scale {scale!r}; known: {', '.join(SCALES)}")
    start = time.perf_counter()
    converting = converted_while_loading(optimizations) if scale == "full" else ()
    if scale == "tiny" or checkpoint is not None:
        directory = resolve_checkpoint(checkpoint or str(reference_directory(entry.name)))
        runner = _from_checkpoint(entry, directory, device, dtype, converting)
        source = str(checkpoint) if checkpoint else "reference"
        notes: tuple[str, ...] = ()
    else:
        runner, notes = _from_random(entry, device, dtype, converting, seed)
        source = "random"
    return Loaded(runner, entry, scale, source, time.perf_counter() - start, notes)


def converted_while_loading(optimizations: Sequence[Optimization]) -> tuple[Optimization, ...]:
    """Those of `optimizations` that take their weights while loading."""
    return tuple(part for part in optimizations if part.converts_while_loading())


def _from_checkpoint(
    entry: ModelEntry, directory: Path, device: str, dtype: str, converting: Sequence[Optimization]
) -> Runner:
    config = validate_checkpoint(entry, directory)
    copies = MERGING_COPIES if entry.mixture_of_experts else 1
    _refuse(config, device, dtype, converting)
    check_memory(entry, config, device, dtype, converting, copies)
    model, info = model_class(entry).from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported by check_loaded, by name
        **_quantization(converting),
    )
    check_loaded(directory, info)
    return Runner(model.eval().to(device), load_processor(entry, directory))


def _quantization(converting: Sequence[Optimization]) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that make it convert every tensor as it is read."""
    if not converting:
        return {}
    from optimizations.weights.hf_quantizer import ConvertWhileLoading

    return {"quantization_config": ConvertWhileLoading(spec_of(converting))}


def _from_random(
    entry: ModelEntry, device: str, dtype: str, converting: Sequence[Optimization], seed: int
) -> tuple[Runner, tuple[str, ...]]:
    config = full_config(entry.name)
    _refuse(config, device, dtype, converting)
    check_memory(entry, config, device, dtype, converting)
    model = random_model(entry, config, device, dtype, converting, seed)
    processor = load_processor(entry, reference_directory(entry.name))
    if entry.multimodal:
        _adopt_vision(model, processor)
    note = "random weights; tokenizer of the tiny reference, whose ids are all below the published vocabulary"
    return Runner(model, processor), (note,)


def random_model(
    entry: ModelEntry,
    config: Any,
    device: str = "cpu",
    dtype: str = "bfloat16",
    converting: Sequence[Optimization] = (),
    seed: int = 0,
) -> PreTrainedModel:
    """A model of `config` with seeded random weights; converted parts never exist unconverted."""
    model = meta_model(entry, config, getattr(torch, dtype))
    originals = original_parameters(model)
    for part in converting:
        part.convert_meta(model)
    return materialize(model, originals, device, seed)


def _refuse(config: Any, device: str, dtype: str, converting: Sequence[Optimization]) -> None:
    for part in converting:
        reason = part.refusal(Target(config, device, dtype))
        if reason:
            raise Refusal(f"{part.name} refuses {config.model_type}: {reason}")


def _adopt_vision(model: PreTrainedModel, processor: Any) -> None:
    """Make the tiny reference's processor fit a model of published dimensions: patches, sizes of images, token ids."""
    vision = model.config.vision_config
    processor.image_processor.size = type(processor.image_processor.size)(**_PUBLISHED_PIXELS)
    for name in ("patch_size", "temporal_patch_size"):
        setattr(processor.image_processor, name, getattr(vision, name))
    processor.image_processor.merge_size = vision.spatial_merge_size
    for name, attribute in _VISION_TOKENS.items():
        setattr(model.config, name, getattr(processor, attribute))
