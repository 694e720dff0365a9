"""From entry and scale to a runner: the reference checkpoints and directories written by save_pretrained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from optimizations.errors import Refusal
from optimizations.registry import parse
from optimizations.session import apply_all
from optimizations.weights.kept import packed_modules
from pytest_inferencepio.catalog import loading
from pytest_inferencepio.catalog.configs import full_config
from pytest_inferencepio.catalog.entries import ENTRIES, lookup
from pytest_inferencepio.catalog.loading import load
from pytest_inferencepio.catalog.processors import load_processor
from pytest_inferencepio.catalog.tiny import reference_directory, tiny_config
from pytest_inferencepio.errors import UnknownName


@pytest.mark.parametrize("name", ENTRIES)
def test_tiny_is_the_reference_checkpoint_and_generates(name):
    loaded = load(ENTRIES[name], "tiny")
    runner = loaded.runner
    assert (loaded.source, loaded.scale, loaded.notes) == ("reference", "tiny", ())
    assert loaded.seconds > 0
    assert not runner.model.training
    assert {parameter.dtype for parameter in runner.model.parameters()} == {torch.bfloat16}
    prompts = [runner.tokenizer(text)["input_ids"] for text in ("def f(x):", "import os\nimport sys\n")]
    ids = runner.generate(**runner.pad_left(prompts), max_new_tokens=4, do_sample=False)
    assert ids.shape == (2, max(map(len, prompts)) + 4)


def test_dtype_is_honoured():
    model = load(ENTRIES["qwen3_4b_instruct_2507"], "tiny", dtype="float32").runner.model
    assert model.dtype == torch.float32


def test_the_vision_processor_feeds_the_vision_model():
    runner = load(ENTRIES["qwen3_vl_2b"], "tiny").runner
    text = "<|vision_start|><|image_pad|><|vision_end|>what"
    inputs = runner.processor(text=[text], images=[Image.new("RGB", (128, 128), "red")], return_tensors="pt")
    logits = runner.forward(**inputs).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1] > 64
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ENTRIES)
def test_a_directory_written_by_save_pretrained_loads_as_a_full_checkpoint(name, tmp_path):
    reference = load(ENTRIES[name], "tiny").runner
    reference.model.save_pretrained(tmp_path)
    reference.processor.save_pretrained(tmp_path)
    loaded = load(ENTRIES[name], "full", checkpoint=str(tmp_path))
    assert (loaded.source, loaded.scale) == (str(tmp_path), "full")
    ids = torch.tensor([[5, 70, 300, 12]])
    assert torch.equal(loaded.runner.forward(input_ids=ids).logits, reference.forward(input_ids=ids).logits)
    assert loaded.runner.tokenizer.chat_template == reference.tokenizer.chat_template


def shrunken(name: str):
    """The tiny configuration with the vision half as published: what the full scale asks of the processor."""
    config = tiny_config(name)
    if name == "qwen3_vl_2b":
        config.vision_config.patch_size = 16
        config.image_token_id, config.video_token_id = 1700, 1701
    return config


@pytest.mark.parametrize("spec", ["none", "weight_int4"])
@pytest.mark.parametrize("name", ENTRIES)
def test_full_without_a_checkpoint_is_random_and_says_so(name, spec, monkeypatch):
    monkeypatch.setattr("pytest_inferencepio.catalog.loading.full_config", shrunken)
    parts = parse(spec) if spec != "none" else []
    loaded = load(ENTRIES[name], "full", optimizations=parts, seed=3)
    runner = loaded.runner
    assert (loaded.source, loaded.scale) == ("random", "full")
    assert "random weights; tokenizer of the tiny reference" in loaded.notes[0]
    assert bool(list(packed_modules(runner.model))) == bool(parts)
    undo = apply_all(runner, parts)
    ids = runner.generate(**runner.pad_left([[5, 6, 7], [8, 9]]), max_new_tokens=3, min_new_tokens=3)
    assert ids.shape == (2, 6)
    undo()


def test_the_tiny_processor_fits_a_random_model_of_published_dimensions(monkeypatch):
    monkeypatch.setattr("pytest_inferencepio.catalog.loading.full_config", shrunken)
    runner = load(ENTRIES["qwen3_vl_2b"], "full").runner
    text = "<|vision_start|><|image_pad|><|vision_end|>what"
    inputs = runner.processor(text=[text], images=[Image.new("RGB", (128, 128), "red")], return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == 3 * 2 * 16 * 16
    assert (inputs["input_ids"] == runner.model.config.image_token_id).sum() > 0
    assert runner.forward(**inputs).logits.isfinite().all()


def test_refusals_come_before_any_weight():
    with pytest.raises(
        Refusal, match="weight_int4 refuses qwen3: it takes activations in bfloat16 or float32"
    ):
        load(ENTRIES["qwen3_4b_instruct_2507"], "full", dtype="float16", optimizations=parse("weight_int4"))


def test_unknown_scale_is_refused():
    with pytest.raises(UnknownName, match="unknown scale 'huge'; known: tiny, full"):
        load(ENTRIES["qwen3_vl_2b"], "huge")


@pytest.mark.parametrize(("side", "patches"), [(448, 784), (128, 256), (1000, 3844)])
def test_a_full_scale_vision_model_sees_images_at_the_published_sizes(side: int, patches: int) -> None:
    """784 patches of 16 x 16: the tiny reference's own limit would shrink the image to 256."""
    processor = load_processor(lookup("qwen3_vl_2b"), reference_directory("qwen3_vl_2b"))
    loading._adopt_vision(SimpleNamespace(config=full_config("qwen3_vl_2b")), processor)
    pixels = processor.image_processor(images=[Image.new("RGB", (side, side))], return_tensors="pt")
    assert pixels["pixel_values"].shape[0] == patches
