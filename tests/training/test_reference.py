"""The shipped checkpoints: self-contained, small, the right class, and as good as their stored figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pytest_inferencepio.catalog.processing import image_text_processor
from pytest_inferencepio.catalog.tiny import IMAGE_ID, TINY, reference_directory, tiny_config
from pytest_inferencepio.tasks.drawing import Drawing
from pytest_inferencepio.tasks.evaluate import evaluate_exact, score, tasks_for
from training.models import CLASSES, load_reference
from training.report import lines, stored
from training.save import image_processor
from training.validate import perplexity

MEGABYTE = 1_000_000
SAMPLE = 8


@pytest.mark.parametrize("name", TINY)
def test_a_directory_is_small_and_complete(name: str) -> None:
    directory = reference_directory(name)
    files = {path.name for path in directory.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "figures.json"}
    assert files >= wanted
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 12 * MEGABYTE
    assert json.loads((directory / "config.json").read_text())["architectures"] == [CLASSES[name]]


@pytest.mark.parametrize("name", TINY)
def test_the_shipped_configuration_is_the_tiny_one(name: str) -> None:
    shipped = transformers.AutoConfig.from_pretrained(reference_directory(name))
    expected = tiny_config(name)
    assert type(shipped) is type(expected)
    left, right = shipped.to_dict(), expected.to_dict()
    for key in right.keys() - {"architectures", "transformers_version", "_name_or_path"}:
        assert left[key] == right[key], key


@pytest.mark.parametrize("name", TINY)
def test_weights_are_bfloat16_and_finite(name: str) -> None:
    with safe_open(reference_directory(name) / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            tensor = file.get_tensor(key)
            assert tensor.isfinite().all(), key
            assert tensor.dtype == torch.bfloat16 or key.endswith("e_score_correction_bias"), key


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_small_sample_agrees_with_the_stored_figures(name: str) -> None:
    figures = stored(name)
    model, tokenizer = load_reference(name), AutoTokenizer.from_pretrained(reference_directory(name))
    tasks = tasks_for(model.config)
    options = {"image_processor": image_processor(), "image_token_id": IMAGE_ID}
    scores = evaluate_exact(model.generate, tokenizer, tasks, SAMPLE, seed=11, **options)
    for task, found in scores.items():
        share = figures["tasks"][task]["exact_match"]
        noise = 3 * (share * (1 - share) / SAMPLE) ** 0.5 + 1 / SAMPLE
        assert abs(found.exact_match - share) <= noise + 1e-9, (task, found.correct, share)
    two_windows = perplexity(model, tokenizer, windows=2)
    assert two_windows == pytest.approx(figures["heldout"]["perplexity"], rel=0.5)


def test_the_vision_directory_has_a_processor(tmp_path: Path) -> None:
    processor = image_text_processor(reference_directory("qwen3_vl_2b"))
    (example,) = Drawing("shape").examples(processor.tokenizer, 1, seed=1)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "shape top left:"}]}],
        tokenize=False,
    )
    inputs = processor(images=[example.image], text=[text], return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE_ID).sum() == 64
    assert inputs["pixel_values"].shape == (256, 3 * 2 * 8 * 8)
    assert inputs["image_grid_thw"].tolist() == [[1, 16, 16]]
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()


def test_an_image_without_a_processor_is_refused_in_words(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = Drawing("colour").examples(tokenizer, 1, seed=1)
    with pytest.raises(ValueError, match="'image_colour' shows images, but no image processor was given"):
        score(lambda **_: torch.zeros(1, 1), examples)


def test_the_report_names_tasks_distances_and_what_falls_short() -> None:
    figures = {
        "trained_tokens": 2_000_000,
        "heldout": {"perplexity": 12.0, "trigram_perplexity": 19.93, "tokens": 12288},
        "tasks": {
            "retrieval": {
                "exact_match": 0.5,
                "correct": 2,
                "n": 4,
                "by_distance": {"256": [2, 2], "1024": [0, 2]},
            }
        },
    }
    text = "\n".join(lines("model", figures))
    assert "perplexity    12.00   trigram 19.93" in text
    assert "below 95%" in text
    assert "1024 tokens back     0.0%   0/2" in text
    assert "not trained yet" in "\n".join(lines("model", {"trained_tokens": 0}))
