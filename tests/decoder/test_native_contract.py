"""native_decoder as a technique: what takes transformers' path, exact undo, refusals, compositions, Ctrl-C."""

from __future__ import annotations

import _thread
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from optimizations.compute.native_decoder import NativeDecoder
from optimizations.contract import Target
from optimizations.decoder.cache import NativeCache
from optimizations.errors import IncompatibleOptimizations, Refusal
from optimizations.native.loader import native
from optimizations.registry import parse
from optimizations.runner import Runner
from optimizations.session import apply_all, optimize
from pytest_inferencepio.catalog.tiny import tiny_config

Tiny = Callable[..., Runner]
Prompts = Callable[..., dict[str, Tensor]]
DENSE, SPARSE, LATENT = "qwen3_4b_instruct_2507", "qwen3_coder_30b", "glm_4_7_flash"


def fallbacks(runner: Runner) -> set[str]:
    return runner.model.get_decoder().forward.fallbacks


@pytest.mark.parametrize("argument", ["output_attentions", "output_hidden_states"])
def test_what_is_recorded_inside_takes_transformers_path_and_is_said_once(
    family: str, argument: str, tiny: Tiny, prompts: Prompts, caplog: pytest.LogCaptureFixture
) -> None:
    runner, inputs = tiny(family), prompts(2, 9, padding=2)
    config = runner.text_config
    before = config._attn_implementation_internal
    config._attn_implementation_internal = "eager"  # sdpa gives no maps
    try:
        wanted = runner.forward(**inputs, **{argument: True})
        with optimize(runner, "native_decoder"), caplog.at_level(logging.WARNING):
            got = [runner.forward(**inputs, **{argument: True}) for _ in range(2)]
            assert fallbacks(runner) == {
                f"{argument} is set, and layers inside the native call cannot be recorded"
            }
            [remark] = NativeDecoder().remarks(runner)
    finally:
        config._attn_implementation_internal = before
    name = argument.removeprefix("output_")
    assert len(got[1][name]) == len(wanted[name]) > 0
    assert torch.equal(got[1].logits, wanted.logits)
    assert len([record for record in caplog.records if argument in record.getMessage()]) == 1
    assert (
        remark
        == f"took transformers' path: {argument} is set, and layers inside the native call cannot be recorded"
    )


def test_router_logits_take_transformers_path(tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(SPARSE), prompts(1, 6)
    with optimize(runner, "native_decoder"):
        output = runner.forward(**inputs, output_router_logits=True)
        assert len(output.router_logits) == 4
        assert len(fallbacks(runner)) == 1


def test_generation_goes_on_natively_after_a_step_that_was_recorded(tiny: Tiny, prompts: Prompts) -> None:
    """The native cache is written by transformers' path too."""
    runner, inputs = tiny(LATENT), prompts(2, 12, padding=3)
    wanted = runner.generate(**inputs, max_new_tokens=8, do_sample=False)
    with optimize(runner, "native_decoder"):
        cache = NativeCache(4)
        runner.forward(
            input_ids=inputs["input_ids"][:, :6],
            attention_mask=inputs["attention_mask"][:, :6],
            position_ids=(inputs["attention_mask"][:, :6].cumsum(-1) - 1).clamp_min(0),
            past_key_values=cache,
            output_hidden_states=True,
        )
        got = runner.generate(**inputs, max_new_tokens=8, do_sample=False, past_key_values=cache)
        assert len(fallbacks(runner)) == 1
    assert torch.equal(got, wanted)


def test_gradients_are_those_of_transformers(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(family), prompts(1, 8)
    weight = runner.model.get_decoder().layers[0].self_attn.o_proj.weight

    def gradient() -> Tensor:
        runner.model.zero_grad()
        runner.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert weight.grad is not None
        return weight.grad.clone()

    wanted = gradient()
    with optimize(runner, "native_decoder"):
        got = gradient()
        [reason] = fallbacks(runner)
    runner.model.zero_grad()
    torch.testing.assert_close(got, wanted)
    assert "gradients are enabled and the kernels have none; use torch.inference_mode()" in reason


def unusual(name: str, runner: Runner) -> dict[str, Any]:
    """Inputs of one kind that the native decoder does not take."""
    ids = torch.arange(8, 20)[None]
    return {
        "foreign cache": {"input_ids": ids, "past_key_values": DynamicCache(config=runner.text_config)},
        "packed rows": {
            "input_ids": ids,
            "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]]),
            "use_cache": False,
        },
        "added mask": {"input_ids": ids, "attention_mask": -0.5 * torch.ones(12, 12).triu(1)[None, None]},
        "masks per head": {
            "input_ids": ids,
            "attention_mask": torch.ones(1, 4, 12, 12, dtype=torch.bool).tril(),
        },
        "dict of masks": {"input_ids": ids, "attention_mask": {"full_attention": None}},
        "unknown argument": {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 12])},
        "another dtype": {"inputs_embeds": torch.randn(1, 4, 256, dtype=torch.float64)},
    }[name]


REASONS = {
    "foreign cache": "a DynamicCache was passed as past_key_values; leave it out",
    "packed rows": "several sequences packed into one row",
    "added mask": "an attention mask that adds to the scores",
    "masks per head": "an attention mask with one plane per head",
    "dict of masks": "the attention mask is a dict",
    "unknown argument": "it does not know the argument cu_seq_lens_q",
}


@pytest.mark.parametrize("name", REASONS)
def test_unusual_inputs_take_transformers_path(name: str, tiny: Tiny) -> None:
    runner = tiny(DENSE)
    wanted = runner.model.get_decoder()
    with torch.inference_mode():
        expected = wanted(**unusual(name, runner)).last_hidden_state
        with optimize(runner, "native_decoder"):
            got = runner.model.get_decoder()(**unusual(name, runner)).last_hidden_state
            [reason] = fallbacks(runner)
    assert reason.startswith(REASONS[name])
    assert torch.equal(got, expected)


def test_training_mode_takes_transformers_path(tiny: Tiny, prompts: Prompts) -> None:
    runner = tiny(DENSE)
    with optimize(runner, "native_decoder"):
        runner.model.train()
        try:
            runner.forward(**prompts(1, 4))
        finally:
            runner.model.eval()
        assert fallbacks(runner) == {"the model is in training mode; call model.eval()"}


def test_embeddings_or_ids_but_not_both(tiny: Tiny) -> None:
    wanted = pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds")
    with optimize(tiny(DENSE), "native_decoder"), torch.inference_mode(), wanted:
        tiny(DENSE).model.get_decoder()()


def test_a_tuple_instead_of_an_output(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(family), prompts(1, 5)
    with optimize(runner, "native_decoder"), torch.inference_mode():
        hidden, cache = runner.model.get_decoder()(**inputs, return_dict=False)
    assert hidden.shape == (1, 5, 256)
    assert isinstance(cache, NativeCache)


def test_undo_leaves_nothing_behind(family: str, tiny: Tiny, prompts: Prompts) -> None:
    runner, inputs = tiny(family), prompts(2, 9)
    wanted = runner.forward(**inputs).logits

    def state() -> dict[str, Any]:
        return {name: (dict(m.__dict__), set(m._buffers)) for name, m in runner.model.named_modules()}

    before = state()
    undo = apply_all(runner, parse("weight_int8+kv_int8+native_decoder"))
    runner.generate(**inputs, max_new_tokens=2)
    undo()
    after = state()
    for name, (attributes, buffers) in before.items():
        assert after[name][0].keys() == attributes.keys()
        assert after[name][1] == buffers
    assert torch.equal(runner.forward(**inputs).logits, wanted)
    assert type(runner.forward(**inputs, use_cache=True).past_key_values) is DynamicCache


class Wrapped(nn.Module):
    """Something in the place of a linear layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_modules_it_does_not_know_are_refused_by_name(tiny: Tiny) -> None:
    runner = tiny(DENSE)
    layer = runner.model.model.layers[2]
    original = layer.mlp.up_proj
    layer.mlp.up_proj = Wrapped(original)
    try:
        with pytest.raises(
            Refusal, match=r"layers\.2\.mlp\.up_proj is a Wrapped; natively there are nn\.Linear"
        ):
            apply_all(runner, [NativeDecoder()])
    finally:
        layer.mlp.up_proj = original
    assert "forward" not in runner.model.get_decoder().__dict__
    layer.forward = layer.forward
    try:
        with pytest.raises(Refusal, match=r"the forward of layers\.2 was replaced"):
            apply_all(runner, [NativeDecoder()])
    finally:
        del layer.__dict__["forward"]


def test_refusals_name_the_reason() -> None:
    part, config = NativeDecoder(), tiny_config(DENSE)
    assert part.refusal(Target(config)) is None
    assert "the kernels run on the CPU and the model is on cuda" in str(part.refusal(Target(config, "cuda")))
    assert "the model is in float16" in str(part.refusal(Target(config, dtype="float16")))
    config.layer_types = ["full_attention", "sliding_attention"]
    assert "it has layers of sliding_attention; only full attention" in str(part.refusal(Target(config)))
    config = tiny_config(DENSE)
    config.hidden_act = "gelu"
    assert "its activation is gelu, SwiGLU needs silu" in str(part.refusal(Target(config)))
    config.model_type = "llama"
    assert "its layers are not known; known: qwen3" in str(part.refusal(Target(config)))


@pytest.mark.parametrize(
    "other",
    [
        "fused_ops",
        "torch_compile",
        "layer_streaming",
        "continuous_batching",
        "visual_token_pruning",
        "weight_nf4",
    ],
)
def test_what_it_cannot_be_combined_with(other: str) -> None:
    with pytest.raises(IncompatibleOptimizations, match="cannot be combined"):
        parse(f"native_decoder+{other}")


@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_ends_a_long_prefill_and_leaves_the_cache_alone(
    count: int, tiny: Tiny, prompts: Prompts, request: pytest.FixtureRequest
) -> None:
    """4,096 tokens take seconds with the portable set; the interrupt comes while they run."""
    runner, before = tiny(DENSE), (native().isa(), torch.get_num_threads())
    request.addfinalizer(lambda: (native().set_isa(before[0]), torch.set_num_threads(before[1])))
    native().set_isa("portable")
    torch.set_num_threads(count)

    with optimize(runner, "native_decoder"), torch.inference_mode():
        decoder = runner.model.get_decoder()
        cache = decoder(**prompts(1, 3), use_cache=True).past_key_values
        kept = [layer.keys[:, :, :3].clone() for layer in cache.layers]
        interrupt = threading.Thread(target=lambda: (time.sleep(0.2), _thread.interrupt_main()))
        interrupt.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                decoder(input_ids=torch.full((1, 4096), 9), past_key_values=cache)
        finally:
            interrupt.join()
        assert cache.get_seq_length() == 3
        assert all(
            torch.equal(layer.keys[:, :, :3], old) for layer, old in zip(cache.layers, kept, strict=True)
        )
        step = decoder(input_ids=torch.full((1, 2), 9), past_key_values=cache).last_hidden_state
        assert torch.isfinite(step).all()
        assert cache.get_seq_length() == 5
