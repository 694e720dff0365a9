"""kv_int8 as a technique: exact undo, packed weights, compositions, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from optimizations.cache.kv_int8 import KVInt8
from optimizations.contract import Target
from optimizations.errors import IncompatibleOptimizations, InvalidSpec
from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all, optimize
from pytest_inferencepio.catalog.tiny import tiny_config

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
DENSE, LATENT = "qwen3_4b_instruct_2507", "glm_4_7_flash"


def test_undo_leaves_nothing_behind(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner = tiny(family)
    inputs = prompts(2, 9)
    wanted = runner.forward(**inputs).logits

    def state() -> dict[str, Any]:
        found: dict[str, Any] = {"config": runner.model.config.to_dict()}
        for name, module in runner.model.named_modules():
            found[name] = (
                sorted(module.__dict__),
                sorted(module._buffers),
                sorted(module._non_persistent_buffers_set),
                len(module._forward_pre_hooks) + len(module._forward_pre_hooks_with_kwargs),
                getattr(module, "config", None) and module.config._attn_implementation,
            )
        return found

    before = state()
    undo = apply_all(runner, [KVInt8()])
    assert state() != before
    runner.generate(**inputs, max_new_tokens=2)
    undo()
    assert state() == before
    assert torch.equal(runner.forward(**inputs).logits, wanted)
    assert type(runner.forward(**inputs, use_cache=True).past_key_values) is DynamicCache


class Packed(nn.Module):
    """A linear layer that shows no floating-point weight, as quantized ones."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
        self.hidden = [linear]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)


class PackedWithAccess(Packed):
    def dequantize(self) -> Tensor:
        return self.hidden[0].weight.detach().clone()


class Unreadable(Packed):
    def dequantize(self) -> Tensor:
        raise RuntimeError("its weights are gone")


def test_a_failure_half_way_undoes_what_was_done(tiny: Tiny) -> None:
    runner = tiny(LATENT)
    last = runner.model.model.layers[-1].self_attn
    original, implementation = last.kv_b_proj, runner.text_config._attn_implementation
    last.kv_b_proj = Unreadable(original)
    try:
        with pytest.raises(RuntimeError, match="its weights are gone"):
            KVInt8().apply(runner)
    finally:
        last.kv_b_proj = original
    assert runner.text_config._attn_implementation == implementation
    assert not any("expand_kv" in layer.self_attn.__dict__ for layer in runner.model.model.layers)
    assert not runner.model.model._forward_pre_hooks


@pytest.mark.parametrize("packed", [Packed, PackedWithAccess])
def test_a_packed_kv_projection_is_absorbed_too(packed: type[Packed], tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(LATENT), prompts(2, 30)
    with optimize(runner, "kv_int8"):
        wanted = runner.forward(**inputs, use_cache=True).logits
    layers = runner.model.model.layers
    originals = [layer.self_attn.kv_b_proj for layer in layers]
    try:
        for layer in layers:
            layer.self_attn.kv_b_proj = packed(layer.self_attn.kv_b_proj)
        with optimize(runner, "kv_int8"):
            buffers = {name for name, _ in runner.model.named_buffers() if "absorbed" in name}
            assert len(buffers) == len(layers)
            assert not any("absorbed" in name for name in runner.model.state_dict())
            got = runner.forward(**inputs, use_cache=True).logits
        assert not any("absorbed" in name for name, _ in runner.model.named_buffers())
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.self_attn.kv_b_proj = original
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_latents_are_never_expanded(tiny: Tiny, prompts: Prompts) -> None:
    """kv_b_proj of every layer is not called once while decoding."""
    runner, calls = tiny(LATENT), []
    handles = [
        layer.self_attn.kv_b_proj.register_forward_hook(lambda *_: calls.append(1))
        for layer in runner.model.model.layers
    ]
    runner.generate(**prompts(1, 20), max_new_tokens=4, do_sample=False)
    stock = len(calls)
    with optimize(runner, "kv_int8"):
        calls.clear()  # of the pass that measured channels
        runner.generate(**prompts(1, 20), max_new_tokens=4, do_sample=False)
    for handle in handles:
        handle.remove()
    assert stock > 0
    assert not calls


@pytest.mark.parametrize(
    "spec", ["kv_int8+fused_ops", "weight_int8+kv_int8", "weight_int8+kv_int8+fused_ops"]
)
def test_compositions_generate(spec: str, family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(family, torch.bfloat16), prompts(2, 30, padding=4)
    real = inputs["attention_mask"].bool()
    before = runner.forward(**inputs).logits[real].float()
    with optimize(runner, spec):
        after = runner.forward(**inputs, use_cache=True).logits[real].float()
        assert runner.generate(**inputs, max_new_tokens=5, do_sample=False).shape == (2, 35)
    assert ((after - before).norm() / before.norm()).item() < 0.3


def test_a_gradient_through_the_cache_is_refused_in_words(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(family), prompts(1, 8)
    with optimize(runner, "kv_int8"):
        loss = runner.model(**inputs, labels=inputs["input_ids"], use_cache=True).loss
        with pytest.raises(RuntimeError, match="kv_int8 has no gradient.*use_cache=False"):
            loss.backward()
        runner.model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    embedding = runner.model.get_input_embeddings().weight
    assert embedding.grad is not None
    assert embedding.grad.abs().sum() > 0
    runner.model.zero_grad()


def test_another_attention_over_the_cache_is_refused_in_words(tiny: Tiny, prompts: Prompts) -> None:
    runner = tiny(DENSE)
    with optimize(runner, "kv_int8"):
        runner.text_config._attn_implementation_internal = "sdpa"
        with pytest.raises(AttributeError, match="keep attn_implementation as the technique sets it"):
            runner.forward(**prompts(1, 5), use_cache=True)


def test_refusals_name_the_reason() -> None:
    part, config = KVInt8(), tiny_config(DENSE)
    assert part.refusal(Target(config)) is None
    assert part.refusal(Target(tiny_config(LATENT))) is None
    assert "the kernel runs on the CPU and the model is on cuda" in str(part.refusal(Target(config, "cuda")))
    assert "the model is in float16" in str(part.refusal(Target(config, dtype="float16")))
    config.layer_types = ["full_attention", "sliding_attention"]
    assert "it has layers of sliding_attention; only full attention" in str(part.refusal(Target(config)))
    config = tiny_config(DENSE)
    config.head_dim = 66
    assert "multiple of 4 values, at most 1024; it has (66,)" in str(part.refusal(Target(config)))
    config.model_type = "llama"
    assert "its attention is not known; known: qwen3" in str(part.refusal(Target(config)))


def test_settings_and_conflicts_are_checked() -> None:
    with pytest.raises(InvalidSpec, match="equalize must be true or false, got 3"):
        KVInt8(equalize=3)  # type: ignore[arg-type]
    [part] = parse("kv_int8(equalize=false)")
    assert isinstance(part, KVInt8)
    assert not part.equalize
    with pytest.raises(
        IncompatibleOptimizations, match="kv_int8 and torch_compile cannot be combined: it compiles"
    ):
        parse("torch_compile+kv_int8")
