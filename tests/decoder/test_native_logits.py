"""The native decoder computes what transformers computes, for every family, weight, length and instruction set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizations.decoder.cache import NativeCache
from optimizations.native.loader import native
from optimizations.runner import Runner
from optimizations.session import optimize
from optimizations.weights.kept import packed_modules

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
Near = Callable[..., None]
DENSE, LATENT, VISION = "qwen3_4b_instruct_2507", "glm_4_7_flash", "qwen3_vl_2b"


def natively(runner: Runner, spec: str = "", **inputs: Any) -> Any:
    """One pass with the native decoder on top of `spec`, which no pass may leave."""
    with optimize(runner, *(spec,) * bool(spec), "native_decoder"):
        output = runner.forward(**inputs)
        assert runner.model.get_decoder().forward.fallbacks == set()
    return output


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33])
def test_float32_logits_are_those_of_transformers(
    family: str, tokens: int, tiny: Tiny, prompts: Prompts, assert_near: Near
) -> None:
    runner, inputs = tiny(family), prompts(2, tokens)
    assert_near(natively(runner, **inputs).logits, runner.forward(**inputs).logits, inputs)


def test_every_instruction_set_and_number_of_threads(
    family: str, isa: str, threads: int, tiny: Tiny, prompts: Prompts, assert_near: Near
) -> None:
    runner, inputs = tiny(family), prompts(3, 19, padding=6)
    assert_near(natively(runner, **inputs).logits, runner.forward(**inputs).logits, inputs)


def test_a_long_prompt(family: str, tiny: Tiny, prompts: Prompts, assert_near: Near) -> None:
    runner, inputs = tiny(family), prompts(1, 1050, padding=7)
    got = natively(runner, **inputs, logits_to_keep=9).logits
    assert_near(got, runner.forward(**inputs, logits_to_keep=9).logits, inputs)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_pass_in_blocks(family: str, rows: int, tiny: Tiny, prompts: Prompts, assert_near: Near) -> None:
    """Blocks of 32 rows: keys of one are seen by the next, first tokens and later ones, whole rows or parts of them."""
    runner = tiny(family)
    for inputs in (prompts(rows, 75, padding=7), prompts(rows, 21)):
        wanted = runner.forward(**inputs).logits
        with optimize(runner, "native_decoder"):
            runner.model.get_decoder().forward.plan.decoder.block_rows = 32
            assert_near(runner.forward(**inputs).logits, wanted, inputs)


def test_a_block_holds_a_second_of_work_at_most(tiny: Tiny) -> None:
    with optimize(tiny(DENSE), "native_decoder"):
        decoder = tiny(DENSE).model.get_decoder().forward.plan.decoder
        assert decoder.block_rows == 2048
        with pytest.raises(ValueError, match="block_rows must be positive"):
            decoder.block_rows = 0


def test_no_cache_is_needed(family: str, tiny: Tiny, prompts: Prompts, assert_near: Near) -> None:
    runner, inputs = tiny(family), prompts(2, 21, padding=3)
    output = natively(runner, **inputs, use_cache=False)
    assert output.past_key_values is None
    assert torch.equal(output.logits, natively(runner, **inputs, use_cache=True).logits)
    assert_near(output.logits, runner.forward(**inputs, use_cache=False).logits, inputs)


@pytest.mark.parametrize("pieces", [(40, 1, 1), (1, 41), (17, 24, 1), (3, 3, 36)])
def test_a_prompt_in_pieces_is_the_prompt(
    family: str, pieces: tuple[int, ...], tiny: Tiny, prompts: Prompts, assert_near: Near
) -> None:
    """History and several new tokens, absorbed or expanded in GLM, with a padded row."""
    runner, inputs = tiny(family), prompts(2, 42, padding=5)
    wanted, done, parts = runner.forward(**inputs).logits, 0, []
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    whole = runner.forward(**inputs, position_ids=positions).logits
    with optimize(runner, "native_decoder"):
        cache = None
        for count in pieces:
            output = runner.forward(
                input_ids=inputs["input_ids"][:, done : done + count],
                attention_mask=inputs["attention_mask"][:, : done + count],
                position_ids=positions[:, done : done + count],
                past_key_values=cache,
                use_cache=True,
            )
            cache, done = output.past_key_values, done + count
            parts.append(output.logits)
        assert runner.model.get_decoder().forward.fallbacks == set()
    assert cache.get_seq_length() == 42
    assert wanted.shape == whole.shape
    assert_near(torch.cat(parts, 1), whole, inputs)


def divergences(wanted: Tensor, got: Tensor) -> Tensor:
    a, b = wanted.float().log_softmax(-1), got.float().log_softmax(-1)
    return (a.exp() * (a - b)).sum(-1)


def divergence(wanted: Tensor, got: Tensor) -> float:
    return divergences(wanted, got).mean().item()


def test_bfloat16_is_as_near_to_exact_as_transformers_is(family: str, tiny: Tiny, prompts: Prompts) -> None:
    """Random routers choose other experts at the least rounding, so both are compared with float32, not with another."""
    runner, inputs = tiny(family, torch.bfloat16), prompts(4, 64)
    stock, got = runner.forward(**inputs).logits, natively(runner, **inputs).logits
    wide = copy.deepcopy(runner.model).float()
    with torch.inference_mode():
        exact = wide(**inputs).logits
    assert divergence(exact, got) < 1.5 * divergence(exact, stock)


def dequantized(runner: Runner, weights: str) -> Any:
    """The model with the values of its packed weights, dense."""
    dense, values = copy.deepcopy(runner.model), {}
    with optimize(runner, weights):
        for name, module in packed_modules(runner.model):
            path = name.removesuffix(".table")  # of an embedding that the head is tied to
            values |= {f"{path}.{key}": value for key, value in module.dequantize().items()}
    assert not dense.load_state_dict(values, strict=False).unexpected_keys
    return dense


@pytest.mark.parametrize("weights", ["weight_int8", "weight_int4", "weight_int4(group_size=128)"])
def test_packed_weights_are_as_near_to_dequantized_ones_as_their_modules_are(
    family: str, weights: str, tiny: Tiny, prompts: Prompts
) -> None:
    """What is left is the rounding of activations to int8, the same in both."""
    runner, inputs = tiny(family), prompts(4, 40)
    with torch.inference_mode():
        exact = dequantized(runner, weights)(**inputs).logits
    with optimize(runner, weights):
        modules = runner.forward(**inputs).logits
    assert divergence(exact, natively(runner, weights, **inputs).logits) < 1.5 * divergence(exact, modules)


@pytest.mark.parametrize("weights", ["weight_int8", "weight_int4"])
@pytest.mark.parametrize("rows", [1, 2])
def test_short_passes_absorb_packed_latent_weights_as_they_are(
    weights: str, rows: int, tiny: Tiny, prompts: Prompts
) -> None:
    """Up to eight queries read kv_b_proj packed, more of them its dense copy: both are the dequantized model.

    The median of positions: some of the random routers choose other experts at the least rounding.
    """
    runner, inputs = tiny(LATENT), prompts(rows, 40)
    with torch.inference_mode():
        exact = dequantized(runner, weights)(**inputs).logits
    with optimize(runner, weights):
        modules = runner.forward(**inputs).logits
    pieces, start, cache = [], 0, NativeCache(4)
    with optimize(runner, weights, "native_decoder"):
        for length in (12, 1, 2, 4, 3, 1, 5, 12):
            ids = inputs["input_ids"][:, start : start + length]
            at = torch.arange(start, start + length).expand(rows, -1)
            output = runner.forward(input_ids=ids, position_ids=at, past_key_values=cache)
            pieces.append(output.logits)
            start += length
        assert runner.model.get_decoder().forward.fallbacks == set()
    got, usual = (divergences(exact, logits).median() for logits in (torch.cat(pieces, 1), modules))
    assert got < 1.5 * usual


@pytest.mark.parametrize("spec", ["kv_int8", "weight_int8+kv_int8"])
def test_an_int8_cache_gives_what_its_own_attention_gives(
    family: str, spec: str, tiny: Tiny, prompts: Prompts
) -> None:
    runner, inputs = tiny(family), prompts(2, 40, padding=4)
    real = inputs["attention_mask"].bool()
    with optimize(runner, spec):
        wanted = runner.forward(**inputs, use_cache=True).logits[real]
    output = natively(runner, spec, **inputs, use_cache=True)
    assert type(output.past_key_values).__name__ == "Int8Cache"
    assert divergence(wanted, output.logits[real]) < 2e-3


def test_repeats_and_numbers_of_threads_give_the_same_bits(
    family: str, tiny: Tiny, prompts: Prompts, request: pytest.FixtureRequest
) -> None:
    runner, inputs = tiny(family, torch.bfloat16), prompts(2, 300, padding=3)
    before, runs = torch.get_num_threads(), []
    request.addfinalizer(lambda: torch.set_num_threads(before))
    with optimize(runner, "native_decoder"):
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            cache = runner.forward(**inputs, use_cache=True).past_key_values
            ids = torch.full((2, 1), 9)
            mask = torch.ones(2, 301, dtype=torch.int64)
            decoder = runner.model.get_decoder()
            step = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
            with torch.inference_mode():
                runs.append(decoder(**step).last_hidden_state)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[1], runs[2])


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_full_mask_is_honoured(
    family: str, kind: str, tiny: Tiny, prompts: Prompts, assert_near: Near
) -> None:
    """Neither causal nor padding: tokens 0 .. 4 are hidden from 12 on, and 3 looks ahead."""
    runner, inputs = tiny(family), prompts(2, 24)
    seen = torch.ones(24, 24, dtype=torch.bool).tril()
    seen[12:, :5] = False
    seen[3, 7] = True
    mask = seen if kind == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    full = {"input_ids": inputs["input_ids"], "attention_mask": mask[None, None].expand(2, 1, 24, 24)}
    assert_near(natively(runner, **full).logits, runner.forward(**full).logits, inputs)


def test_images_deepstack_and_their_positions(tiny: Tiny, assert_near: Near) -> None:
    runner, generator = tiny(VISION), torch.Generator().manual_seed(2)
    words = torch.randint(8, 1792, (12,), generator=generator).tolist()
    ids = torch.tensor([[*words[:5], 3, *[5] * 16, 4, *words[5:]]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64, 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == 5).int(),
    }
    wanted = runner.forward(**inputs).logits
    tokens = runner.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert_near(natively(runner, **inputs).logits, wanted, inputs)
    with optimize(runner, "native_decoder"):
        assert torch.equal(runner.generate(**inputs, max_new_tokens=8, do_sample=False), tokens)
        assert runner.model.get_decoder().forward.fallbacks == set()


def test_deepstack_rows_must_fit_the_visual_tokens(tiny: Tiny) -> None:
    decoder = tiny(VISION).model.get_decoder()
    with (
        optimize(tiny(VISION), "native_decoder"),
        torch.inference_mode(),
        pytest.raises(
            ValueError, match=r"deepstack_visual_embeds must have shape \(2, 256\).*got \(3, 256\)"
        ),
    ):
        decoder(
            input_ids=torch.full((1, 4), 9),
            visual_pos_masks=torch.tensor([[False, True, True, False]]),
            deepstack_visual_embeds=[torch.zeros(3, 256)],
        )


def test_latents_are_absorbed_where_that_takes_fewer_multiplications() -> None:
    """GLM-4.7-Flash: nope 192, rope 64, v 256, rank 512. Per head and pair 1088 against 512 multiply-adds, and 229,376 to
    expand a latent: 229376 / 576 = 398 queries over a long history."""
    absorbs, dims = native().decoder.absorbs, (192, 64, 256, 512)
    assert all(absorbs(1, length, *dims) for length in (2, 100, 16384))
    assert absorbs(300, 16384, *dims)
    assert absorbs(390, 100_000, *dims)
    assert not absorbs(399, 100_000, *dims)
    assert not absorbs(128, 128, *dims)

    def flops(queries: int, length: int) -> tuple[int, int]:
        pairs = sum(length - queries + i + 1 for i in range(queries))
        return queries * 512 * 448 + pairs * (512 + 64 + 512), length * 512 * 448 + pairs * (192 + 64 + 256)

    for queries in (1, 7, 64, 200, 300, 397, 398, 500):
        for length in (500, 777, 4096):
            absorbed, expanded = flops(queries, length)
            assert absorbs(queries, length, *dims) == (absorbed <= expanded)
