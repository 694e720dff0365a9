"""kv_int8 in whole models: generate and forward, batches, padding, beams, other caches, outliers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from optimizations.cache import channel_scale
from optimizations.cache.channel_scale import measured
from optimizations.cache.int8_layer import Int8Cache
from optimizations.cache.kv_int8 import KVInt8
from optimizations.runner import Runner
from optimizations.session import optimize
from pytest_inferencepio.catalog.configs import full_config

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
DENSE, LATENT = "qwen3_4b_instruct_2507", "glm_4_7_flash"


def divergence(before: Tensor, after: Tensor) -> float:
    """Mean KL in nats per position."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [DENSE, LATENT, "qwen3_vl_2b"])
def test_logits_stay_close_over_long_prompts(
    name: str, dtype: torch.dtype, tiny: Tiny, prompts: Prompts
) -> None:
    """Median relative error of a position: a few of GLM's change their experts, whose random routers sit on the fence."""
    runner, inputs = tiny(name, dtype), prompts(2, 300, padding=40)
    real = inputs["attention_mask"].bool()
    before = runner.forward(**inputs).logits[real].float()
    with optimize(runner, "kv_int8"):
        after = runner.forward(**inputs).logits[real].float()
    error = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert error.median().item() < 0.03


def test_a_forward_returns_an_int8_cache_of_half_the_bytes(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner = tiny(family, torch.bfloat16)
    stock = runner.forward(**prompts(2, 192), use_cache=True).past_key_values
    with optimize(runner, "kv_int8"):
        cache = runner.forward(**prompts(2, 192), use_cache=True).past_key_values
        assert isinstance(cache, Int8Cache)
        assert runner.forward(**prompts(2, 5), use_cache=False).past_key_values is None
    assert cache.get_seq_length() == 192
    full = sum(t.nbytes for layer in stock.layers for t in (layer.keys, layer.values)) / (2 * 192)
    stores = [store for layer in cache.layers for store in layer.stores]
    small = sum((s.codes.nbytes + s.scales.nbytes) / (2 * s.capacity) for s in stores)
    assert small / full == pytest.approx(
        sum(s.dim + 4 for s in stores) / sum(2 * s.dim for s in stores), rel=0.04
    )
    assert small < 0.54 * full


def test_one_token_at_a_time_gives_the_logits_of_the_whole_prompt(
    family: str, tiny: Tiny, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts read the int8 keys too, so both ways see the same cache. Over two borders of 16 tokens.

    Every expert runs: with a choice of experts, rounding that flips one changes a token's logits altogether.
    """
    runner, ids = tiny(family), prompts(2, 40)["input_ids"]
    for module in runner.model.modules():
        if hasattr(module, "top_k"):
            experts = getattr(module, "num_experts", None) or runner.text_config.n_routed_experts
            monkeypatch.setattr(module, "top_k", experts)
    with optimize(runner, "kv_int8"):
        whole = runner.forward(input_ids=ids, use_cache=True).logits
        cache, rows = None, []
        for piece in (ids[:, :13], *ids[:, 13:20].split(1, 1), ids[:, 20:]):
            start = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(start, start + piece.shape[1])[None].expand(2, -1)
            out = runner.forward(
                input_ids=piece, past_key_values=cache, use_cache=True, position_ids=positions
            )
            cache, rows = out.past_key_values, [*rows, out.logits]
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-2, atol=2e-3 * whole.abs().max().item())


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_agrees_with_recomputing_everything(
    how: dict[str, int], family: str, tiny: Tiny, prompts: Prompts
) -> None:
    """Each token by a forward of the whole sequence over a new int8 cache: what generate must find step by step."""
    runner, inputs = tiny(family), prompts(2, 21, padding=4)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, **how}
    with optimize(runner, "kv_int8"):
        got = runner.generate(**inputs, **options)
        assert torch.equal(got, runner.generate(**inputs, **options))
        if not how:
            mask = torch.cat((inputs["attention_mask"], torch.ones(2, 10, dtype=torch.int64)), 1)
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            scores = runner.forward(input_ids=got, attention_mask=mask, position_ids=positions).logits
            predicted = scores[:, 20:-1].argmax(-1)
            assert torch.equal(predicted, got[:, 21:])
    assert got.shape == (2 * how.get("num_return_sequences", 1), 31)


def test_chunked_prompts_speculation_and_continuation_find_the_same_tokens(
    family: str, tiny: Tiny, prompts: Prompts
) -> None:
    """transformers' own ways to fill, crop and reuse a cache."""
    runner, ids = tiny(family), prompts(1, 10)["input_ids"].repeat(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with optimize(runner, "kv_int8"):
        out = runner.generate(**inputs, **options, return_dict_in_generate=True)
        assert torch.equal(out.sequences, runner.generate(**inputs, **options, prompt_lookup_num_tokens=4))
        assert torch.equal(out.sequences, runner.generate(**inputs, **options, prefill_chunk_size=16))
        assert out.past_key_values.get_seq_length() == 51
        more = torch.cat((out.sequences, ids[:, :3]), 1)
        again = {"input_ids": more, "attention_mask": torch.ones_like(more), **options}
        continued = runner.generate(**again, past_key_values=out.past_key_values)
        assert torch.equal(continued, runner.generate(**again))


def test_padding_on_the_left_changes_nothing(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(family), prompts(2, 33, padding=9)
    with optimize(runner, "kv_int8"):
        batch = runner.generate(**inputs, max_new_tokens=8, do_sample=False)
        alone = runner.generate(
            input_ids=inputs["input_ids"][:1, 9:],
            attention_mask=inputs["attention_mask"][:1, 9:],
            max_new_tokens=8,
            do_sample=False,
        )
    assert torch.equal(batch[0, 33:], alone[0, 24:])


def test_sampling_repeats_under_a_seed(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner = tiny(family)
    with optimize(runner, "kv_int8"):
        drawn = []
        for _ in range(2):
            torch.manual_seed(11)
            drawn.append(
                runner.generate(**prompts(2, 12), max_new_tokens=12, do_sample=True, temperature=1.5)
            )
    assert torch.equal(*drawn)


def test_a_float_mask_of_four_dimensions_is_honoured(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, ids = tiny(family), prompts(1, 24)["input_ids"]
    seen = torch.ones(24, 24, dtype=torch.bool).tril()
    seen[12:, :5] = False
    with optimize(runner, "kv_int8"):
        outs = [
            runner.forward(input_ids=ids, attention_mask=mask, use_cache=True).logits
            for mask in (seen[None, None], torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None])
        ]
        plain = runner.forward(input_ids=ids, use_cache=True).logits
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[0][:, :12], plain[:, :12], rtol=1e-3, atol=1e-2)
    assert not torch.allclose(outs[0][:, 12:], plain[:, 12:], atol=0.1)


def test_without_a_cache_or_with_their_own_callers_get_transformers_attention(
    family: str, tiny: Tiny, prompts: Prompts
) -> None:
    runner, inputs = tiny(family), prompts(2, 20, padding=3)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    plain = runner.forward(**inputs, use_cache=False).logits
    wanted = runner.generate(**inputs, **options)
    with optimize(runner, "kv_int8"):
        real = inputs["attention_mask"].bool()
        got = runner.forward(**inputs, use_cache=False).logits
        torch.testing.assert_close(got[real], plain[real], rtol=1e-4, atol=1e-4)
        own = DynamicCache(config=runner.text_config)
        assert torch.equal(runner.generate(**inputs, **options, past_key_values=own), wanted)
        assert own.get_seq_length() == 25
        assert torch.equal(runner.generate(**inputs, **options, use_cache=False), wanted)
        static = runner.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, wanted)


def test_a_dense_cache_with_history_takes_several_queries(family: str, tiny: Tiny, prompts: Prompts) -> None:
    """No mask means causal from the end, where torch's own causal flag counts from the start."""
    runner, ids = tiny(family), prompts(1, 20)["input_ids"]
    wanted = runner.forward(input_ids=ids).logits
    with optimize(runner, "kv_int8"):
        own = DynamicCache(config=runner.text_config)
        runner.forward(input_ids=ids[:, :12], past_key_values=own)
        positions = torch.arange(12, 20)[None]
        rest = runner.forward(input_ids=ids[:, 12:], past_key_values=own, position_ids=positions).logits
    torch.testing.assert_close(rest, wanted[:, 12:], rtol=1e-3, atol=1e-3)


def test_equalization_uses_the_key_norm_and_helps_with_outliers(tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(DENSE), prompts(2, 200)
    norms = [layer.self_attn.k_norm.weight for layer in runner.model.model.layers]
    saved = [norm.detach().clone() for norm in norms]
    try:
        for norm in norms:
            norm.data[[3, 20]] = 20.0
        before, errors = runner.forward(**inputs).logits, []
        for equalize in (True, False):
            with optimize(runner, KVInt8(equalize=equalize)):
                errors.append(divergence(before, runner.forward(**inputs, use_cache=True).logits))
    finally:
        for norm, old in zip(norms, saved, strict=True):
            norm.data.copy_(old)
    assert errors[0] < errors[1] / 2


def test_a_nearly_constant_latent_channel_is_measured_and_taken_out(tiny: Tiny, prompts: Prompts) -> None:
    """Its norm's weight is like the others': only a pass shows it."""
    runner, inputs = tiny(LATENT), prompts(2, 200)
    attentions = [layer.self_attn for layer in runner.model.model.layers]
    saved = [one.kv_a_proj_with_mqa.weight.detach().clone() for one in attentions]
    try:
        for one in attentions:
            one.kv_a_proj_with_mqa.weight.data[5] *= 40
        before, errors = runner.forward(**inputs).logits, []
        for equalize in (True, False):
            with optimize(runner, KVInt8(equalize=equalize)):
                out = runner.forward(**inputs, use_cache=True)
                errors.append(divergence(before, out.logits))
            channel = out.past_key_values.layers[1].stores[0].channel
            assert (channel is not None) == equalize
            if equalize:
                assert channel[5] == 1 == channel.max()
                assert channel.median() < 0.3
    finally:
        for one, old in zip(attentions, saved, strict=True):
            one.kv_a_proj_with_mqa.weight.data.copy_(old)
    assert errors[0] < errors[1] / 2


def test_measured_channels_are_the_same_every_time(tiny: Tiny) -> None:
    decoder = tiny(LATENT).model.get_decoder()
    state = torch.get_rng_state()
    first, second = measured(decoder), measured(decoder)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_measuring_leaves_training_mode_as_it_is(tiny: Tiny) -> None:
    """With gradient checkpointing a training model keeps no cache: the pass is one of evaluation."""
    model = tiny(LATENT).model
    decoder = model.get_decoder()
    wanted = measured(decoder)
    model.activation_checkpointing_enable()
    model.train()
    decoder.layers[1].eval()
    try:
        got = measured(decoder)
        assert decoder.training
        assert decoder.layers[0].training
        assert not decoder.layers[1].training
    finally:
        model.activation_checkpointing_disable()
        model.eval()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_channels_without_any_value_are_not_divided() -> None:
    for size in (torch.zeros(4), torch.tensor([1.0, float("nan"), 1.0, 1.0])):
        assert channel_scale._relative(size) is None
    assert torch.equal(channel_scale._relative(torch.tensor([8.0, 0.0])), torch.tensor([1.0, 1e-3]))


def test_equal_and_zero_norm_weights_need_no_channel(tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(DENSE), prompts(1, 20)
    norm = runner.model.model.layers[0].self_attn.k_norm.weight
    saved = norm.detach().clone()
    try:
        for value in (0.0, 1.7):
            norm.data.fill_(value)
            with optimize(runner, "kv_int8"):
                out = runner.forward(**inputs, use_cache=True)
                assert out.past_key_values.layers[0].stores[0].channel is None
                assert torch.isfinite(out.logits).all()
    finally:
        norm.data.copy_(saved)


def one_layer_of_the_published_model(name: str) -> Runner:
    """The attention of the full-scale model, with a small vocabulary and feed-forward part, in bfloat16."""
    config = full_config(name)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers, text.vocab_size, text.intermediate_size = 1, 512, 256
    for field, value in (
        ("layer_types", ["full_attention"]),
        ("mlp_layer_types", ["dense"]),
        ("num_experts", 8),
    ):
        if hasattr(text, field):
            setattr(text, field, value)
    text.pad_token_id = text.eos_token_id = text.bos_token_id = None
    text.initializer_range = 0.05
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(text).bfloat16().eval()
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.weight.data.uniform_(0.5, 1.5)
    return Runner(model, None)


@pytest.mark.parametrize("name", ["qwen3_4b_instruct_2507", "qwen3_coder_30b", "glm_4_7_flash"])
def test_published_attention_dimensions(name: str, prompts: Prompts) -> None:
    """128 x 32/8, 128 x 32/4, and latents of 512 + 64 for 20 heads: what the attention gives, prompt and one more."""
    runner, ids = one_layer_of_the_published_model(name), prompts(1, 150)["input_ids"] % 512
    outputs: list[Tensor] = []
    attention = runner.model.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, args, output: outputs.append(output[0].float()))
    runner.forward(input_ids=ids)
    wanted = outputs.pop()
    with optimize(runner, "kv_int8+fused_ops"):
        outputs.clear()  # of the pass that measured channels
        cache = runner.forward(input_ids=ids[:, :-1], use_cache=True).past_key_values
        runner.forward(input_ids=ids[:, -1:], past_key_values=cache, position_ids=torch.tensor([[149]]))
    error = (torch.cat(outputs, 1) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.shape == (1, 150)
    assert error.max().item() < 0.03
