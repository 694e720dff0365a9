"""The oracle: the stock model with dropped columns masked out and the positions of the full prompt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from vision_inputs import image_inputs

from optimizations.contract import Target
from optimizations.errors import InvalidSpec, Refusal
from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all, optimize
from optimizations.vision.pruned_prefill import keep_mask
from optimizations.vision.visual_token_pruning import VisualTokenPruning
from pytest_inferencepio.catalog.tiny import tiny_config

SINGLE = [[5, (16, 16), 7]]
TWO_IMAGES = [[3, (8, 8), 4, (16, 8), 6]]
RAGGED = [[5, (16, 16), 7], [9, (8, 8), 2], [12], [2, (8, 8), 3, (8, 16), 4]]
SHAPES = {"single": SINGLE, "two_images": TWO_IMAGES, "ragged": RAGGED}


@pytest.fixture(params=SHAPES)
def inputs(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    return image_inputs(SHAPES[request.param])


@pytest.fixture
def pruned(runner: Runner) -> Iterator[Runner]:
    undo = apply_all(runner, [VisualTokenPruning(keep_ratio=0.5)])
    yield runner
    undo()


def kept_columns(model: Any, inputs: dict[str, torch.Tensor], technique: VisualTokenPruning) -> torch.Tensor:
    """bool [B, L] from the stock model's merged features."""
    visual = inputs["input_ids"] == 5
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    embeds[visual] = torch.cat(features)
    return keep_mask(embeds, visual, technique.select)


def full_positions(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[4, B, L] of the unpruned prompt, as generate() makes them."""
    return model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))


@torch.no_grad()
def oracle(model: Any, inputs: dict[str, torch.Tensor], technique: VisualTokenPruning) -> dict[str, Any]:
    """Inputs for the stock model that hide the dropped columns from every query."""
    keep = kept_columns(model, inputs, technique)
    hidden = {**inputs, "attention_mask": inputs["attention_mask"] * keep}
    return {**hidden, "position_ids": full_positions(model, inputs)}


def test_logits_equal_the_stock_model_with_dropped_columns_masked(
    runner: Runner, inputs: dict[str, torch.Tensor]
) -> None:
    technique = VisualTokenPruning(keep_ratio=0.5)
    masked = oracle(runner.model, inputs, technique)
    expected = runner.forward(**masked).logits
    with optimize(runner, technique):
        found = runner.forward(**inputs).logits
    assert found.shape == expected.shape
    live = masked["attention_mask"].bool()
    torch.testing.assert_close(found[live], expected[live], rtol=1e-4, atol=1e-4)


def test_prefill_and_cache_are_shorter(pruned: Runner) -> None:
    inputs = image_inputs(SINGLE)
    lengths = []
    handle = pruned.model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    cache = pruned.forward(**inputs, use_cache=True).past_key_values
    handle.remove()
    assert inputs["input_ids"].shape[1] == 5 + 66 + 7
    assert lengths == [5 + 34 + 7]
    assert cache.get_seq_length() == 5 + 34 + 7


def test_a_ragged_batch_drops_padding_too(pruned: Runner) -> None:
    cache = pruned.forward(**image_inputs(RAGGED), use_cache=True).past_key_values
    assert cache.get_seq_length() == 5 + 34 + 7


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_equals_the_masked_stock_model(
    runner: Runner, inputs: dict[str, torch.Tensor], cache: str
) -> None:
    technique = VisualTokenPruning(keep_ratio=0.4)
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    expected = runner.generate(**oracle(runner.model, inputs, technique), **settings)
    with optimize(runner, technique):
        found = runner.generate(**inputs, **settings)
    assert torch.equal(found, expected)


def test_sampling_and_beams_run_on_the_same_distribution(runner: Runner) -> None:
    technique = VisualTokenPruning(keep_ratio=0.4)
    inputs = image_inputs(RAGGED)
    masked = oracle(runner.model, inputs, technique)
    sampled: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2}
    beams: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    for settings in (sampled, beams):
        torch.manual_seed(1)
        expected = runner.generate(**masked, **settings)
        with optimize(runner, technique):
            torch.manual_seed(1)
            found = runner.generate(**inputs, **settings)
        assert torch.equal(found, expected)


def test_prompt_lookup_crops_the_shorter_cache_rightly(runner: Runner) -> None:
    inputs = image_inputs(SINGLE)
    inputs["input_ids"][0, -6:] = torch.tensor([9, 10, 11, 9, 10, 11])
    with optimize(runner, VisualTokenPruning()):
        plain = runner.generate(**inputs, max_new_tokens=12, do_sample=False)
        looked_up = runner.generate(**inputs, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, looked_up)


@torch.no_grad()
def test_a_step_without_position_ids_continues_after_the_full_image(runner: Runner) -> None:
    technique = VisualTokenPruning()
    inputs = image_inputs(RAGGED)
    rows = len(RAGGED)
    step = torch.full((rows, 1), 42)
    longer = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], step], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(rows, 1, dtype=torch.int64)], 1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros(rows, 1).int()], 1),
    }
    expected = runner.forward(**oracle(runner.model, longer, technique)).logits[:, -1]
    with optimize(runner, technique):
        for mask in (longer["attention_mask"], None):
            cache = runner.forward(**inputs, use_cache=True).past_key_values
            found = runner.forward(input_ids=step, attention_mask=mask, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_second_turn_continues_the_pruned_cache(runner: Runner) -> None:
    technique = VisualTokenPruning()
    inputs = image_inputs(SINGLE)
    greedy: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    with optimize(runner, technique):
        first = runner.generate(**inputs, max_new_tokens=4, **greedy)
        ids = torch.cat([first.sequences, torch.tensor([[20, 21, 22]])], 1)
        again = runner.generate(
            input_ids=ids, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False
        )
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 7))
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        fresh = runner.generate(
            input_ids=ids, mm_token_type_ids=kinds, **images, max_new_tokens=4, do_sample=False
        )
    assert torch.equal(again, fresh)


def test_text_only_inputs_are_untouched(runner: Runner) -> None:
    inputs = image_inputs([[12], [7]])
    expected = runner.forward(**inputs).logits
    tokens = runner.generate(**inputs, max_new_tokens=5, do_sample=False)
    with optimize(runner, "visual_token_pruning"):
        assert torch.equal(runner.forward(**inputs).logits, expected)
        assert torch.equal(runner.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)


def test_keeping_everything_changes_nothing(runner: Runner, inputs: dict[str, torch.Tensor]) -> None:
    expected = runner.forward(**inputs).logits
    with optimize(runner, VisualTokenPruning(keep_ratio=1.0)):
        assert torch.equal(runner.forward(**inputs).logits, expected)


def test_undo_restores_the_model(runner: Runner, inputs: dict[str, torch.Tensor]) -> None:
    model = runner.model.model
    attributes = {id(module): set(module.__dict__) for module in runner.model.modules()}
    config = copy.deepcopy(runner.model.config.to_dict())
    before = runner.forward(**inputs).logits
    with optimize(runner, "visual_token_pruning"):
        pruned = runner.forward(**inputs).logits
        assert "forward" in model.language_model.__dict__
    assert not torch.equal(pruned, before)
    assert {id(module): set(module.__dict__) for module in runner.model.modules()} == attributes
    assert runner.model.config.to_dict() == config
    assert torch.equal(runner.forward(**inputs).logits, before)


def test_undo_gives_back_an_earlier_override(runner: Runner) -> None:
    tower = runner.model.model.language_model
    tower.forward = earlier = tower.forward
    with optimize(runner, "visual_token_pruning"):
        assert tower.forward is not earlier
    assert tower.__dict__.pop("forward") is earlier


def test_gradients_reach_the_surviving_patches(pruned: Runner) -> None:
    inputs = image_inputs(SINGLE)
    inputs["pixel_values"].requires_grad_()
    pruned.model(**inputs).logits[:, -1].sum().backward()
    assert float(inputs["pixel_values"].grad.abs().sum()) > 0
    pruned.model.zero_grad(set_to_none=True)


def test_a_second_image_on_a_filled_cache_is_an_error(pruned: Runner) -> None:
    inputs = image_inputs(SINGLE)
    cache = pruned.forward(**inputs, use_cache=True).past_key_values
    grown = image_inputs([[5, (16, 16), 7, (8, 8), 2]])
    new = {
        name: value[:, -20:] for name, value in grown.items() if value.shape[:1] == (1,) and value.ndim == 2
    }
    images = {"pixel_values": grown["pixel_values"][256:], "image_grid_thw": grown["image_grid_thw"][1:]}
    new["attention_mask"] = grown["attention_mask"]
    positions = torch.arange(20).view(1, 1, -1).expand(3, 1, -1)
    with pytest.raises(ValueError, match="cannot add images to a cache that already holds 46 tokens"):
        pruned.forward(**{**new, **images}, past_key_values=cache, position_ids=positions)


def test_a_mask_that_does_not_cover_the_prompt_is_an_error(pruned: Runner) -> None:
    cache = pruned.forward(**image_inputs(SINGLE), use_cache=True).past_key_values
    mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"the cache holds 46 of 78 tokens.*full prompt \(79 columns\)"):
        pruned.forward(input_ids=torch.tensor([[42]]), attention_mask=mask, past_key_values=cache)


def test_a_foreign_4d_mask_is_an_error(pruned: Runner) -> None:
    inputs = image_inputs(SINGLE)
    positions = full_positions(pruned.model, inputs)
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool)  # not causal
    with pytest.raises(ValueError, match="not another 4-D attention mask"):
        pruned.forward(**inputs, position_ids=positions)


@torch.inference_mode()
def test_a_cache_that_was_reset_starts_anew(pruned: Runner) -> None:
    inputs = image_inputs(SINGLE)
    cache = StaticCache(config=pruned.text_config, max_cache_len=96)
    expected = pruned.forward(**inputs, past_key_values=cache).logits
    cache.reset()
    assert torch.equal(pruned.forward(**inputs, past_key_values=cache).logits, expected)
    cache.reset()
    other = DynamicCache()
    for ids in (image_inputs([[9]])["input_ids"], torch.tensor([[42]])):
        found = pruned.forward(input_ids=ids, past_key_values=cache).logits
        torch.testing.assert_close(found, pruned.forward(input_ids=ids, past_key_values=other).logits)


@pytest.mark.parametrize("name", ["glm_4_7_flash", "qwen3_4b_instruct_2507", "qwen3_coder_30b"])
def test_text_models_are_refused_in_words(name: str) -> None:
    reason = VisualTokenPruning().refusal(Target(tiny_config(name)))
    assert reason is not None and "reads text only" in reason
    assert VisualTokenPruning().refusal(Target(tiny_config("qwen3_vl_2b"))) is None


def test_another_vision_model_is_refused_in_words(runner: Runner) -> None:
    config = copy.deepcopy(tiny_config("qwen3_vl_2b"))
    config.model_type = "other_vl"
    assert "other_vl's visual tokens is not known" in str(VisualTokenPruning().refusal(Target(config)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("visual_token_pruning(keep_ratio=0)", r"must be in \(0, 1\], got 0"),
        ("visual_token_pruning(keep_ratio=1.5)", r"must be in \(0, 1\], got 1.5"),
        ("visual_token_pruning(keep_ratio=half)", "must be a number, got 'half'"),
        ("visual_token_pruning(method=random)", "one of volume, farthest, uniform, got 'random'"),
        ("visual_token_pruning(ratio=1)", "has no setting 'ratio'"),
    ],
)
def test_bad_settings_are_named(spec: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        parse(spec)


def test_refusal_reaches_the_user() -> None:
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM(tiny_config("qwen3_4b_instruct_2507"))
    with pytest.raises(Refusal, match="visual_token_pruning refuses qwen3: qwen3 reads text only"):
        apply_all(Runner(model, None), [VisualTokenPruning()])
