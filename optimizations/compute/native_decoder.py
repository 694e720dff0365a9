"""native_decoder: all decoder layers in one native call per forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from optimizations.contract import (
    AccuracyBudget,
    Fidelity,
    Kind,
    Optimization,
    Target,
    Undo,
)
from optimizations.errors import Refusal
from optimizations.native.loader import native

if TYPE_CHECKING:
    from optimizations.runner import Runner

MODEL_TYPES = ("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_text", "glm4_moe_lite")
DTYPES = ("bfloat16", "float32")
INSIDE = "the native decoder replaces what it changes: all layers are one call"


@dataclasses.dataclass(frozen=True)
class NativeDecoder(Optimization):
    """The decoder stack in C++, one call per forward pass, over bf16 (lossless in 12 bits too), float32, int8 and int4
    weights.

    transformers spends 6 ms of Python per token on 36 layers, whatever the layers do; one call has none of
    it. Projections that share an input share its quantization, gate and up are one product, a mixture of
    experts is one operation per layer over experts x row tiles. For GLM, short queries are absorbed into the
    latent space and long ones expand the latents, whichever takes fewer multiplications; transformers expands
    the whole history at every step.

    Greedy and sampled decoding run in a loop of its own inside `generate()`, where a token's way to the next logits is
    one call, output layer included (what it saves: optimizations/decoder/token_loop.py); logits processors, stopping
    criteria and streamers are called as by transformers' loop. Hooks on the model, recorded states and foreign caches
    keep transformers' loop.

    `generate()` does not notice: the cache is a transformers `Cache` (bf16 or float32 rows allocated ahead, or
    kv_int8's), which can be cropped, reordered, repeated and reset, so beams, assisted generation and
    prompt_lookup work. Batches padded on the left, full masks, M-RoPE positions and DeepStack inputs are
    done. Gradients, attention maps, hidden states and foreign caches take transformers' path, which is said
    once. Ctrl-C ends a long prefill within a second and leaves the cache as it was. Qwen3-VL's vision tower keeps
    its blocks in Python; patch embedding, rotation, attention and GELU are done as in fused_ops.

    Bound: activations are rounded to the model's dtype where transformers rounds them; sums are float32 in
    another order. Absorbed queries are rounded once more.

    Source: DeepSeek-V2 (arXiv 2405.04434) for absorption; llama.cpp and SGLang's CPU backend for the whole
    stack as one graph.
    """

    name: ClassVar[str] = "native_decoder"
    kind: ClassVar[Kind] = Kind.COMPUTE
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING
    summary: ClassVar[str] = "all decoder layers as one C++ call per forward pass, own KV cache"
    source: ClassVar[str] = "llama.cpp; SGLang CPU backend; DeepSeek-V2 (arXiv 2405.04434)"
    # Measured on the trained references, 1,024 held-out tokens, bf16: KL from stock 2.3e-4 nats, top-1 0.988 to 0.997;
    # coder 4.2e-3 and 0.987, whose routers choose other experts at the least rounding. Stock bf16 is as far from
    # float32 as this is (coder 4.5e-3 and 4.7e-3, the others equal within 7 %).
    budget: ClassVar[AccuracyBudget] = AccuracyBudget(0.01, 0.97, 1.01, 0.02)
    differentiable: ClassVar[bool] = True
    conflicts: ClassVar[Mapping[str, str]] = {
        "fused_ops": INSIDE,
        "torch_compile": INSIDE,
        "layer_streaming": "the native decoder needs the weights of all layers at fixed addresses",
        "continuous_batching": "transformers' engine keeps its own paged cache and attention",
        "visual_token_pruning": "both replace the forward of the text tower",
        "weight_nf4": "NF4 weights have no native product; use weight_int4, weight_int8 or weight_lossless",
    }

    def refusal(self, target: Target) -> str | None:
        if target.model_type not in MODEL_TYPES:
            return f"its layers are not known; known: {', '.join(MODEL_TYPES)}"
        if target.device != "cpu":
            return f"the kernels run on the CPU and the model is on {target.device}"
        if target.dtype not in DTYPES:
            return f"the kernels compute in {' or '.join(DTYPES)}, the model is in {target.dtype}"
        return _unsuitable(target.config.get_text_config(decoder=True))

    def apply(self, runner: Runner) -> Undo:
        from optimizations.decoder.forward import NativeForward
        from optimizations.decoder.generation import native_caches, native_loop
        from optimizations.decoder.plan import build_plan
        from optimizations.forwards import replace_forwards
        from optimizations.vision.tower import TOWER

        native()  # a missing build is an error now, not in the middle of a generation
        model, decoder = runner.model, runner.model.get_decoder()
        if "forward" in decoder.__dict__:
            raise Refusal("the forward of the decoder has already been replaced by something else")
        undos: list[Undo] = []

        def undo() -> None:
            while undos:
                undos.pop()()

        try:
            undos.append(replace_forwards(model, TOWER, self.name))
            undos.append(_absorb(decoder))
            plan = build_plan(decoder, model.get_output_embeddings())
            forward = NativeForward(decoder, plan, decoder.forward)
            decoder.__dict__["forward"] = forward
            undos.append(lambda: decoder.__dict__.pop("forward"))
            undos.append(native_caches(model, plan.layers))
            undos.append(native_loop(model, forward))
        except BaseException:
            undo()
            raise
        return undo

    def unread(self, runner: Runner) -> Collection[str]:
        from optimizations.cache.int8_attention import ABSORBED
        from optimizations.decoder.plan import absorbs_packed

        latent = (
            (name, module) for name, module in runner.model.named_modules() if ABSORBED in module._buffers
        )
        return [f"{name}.{ABSORBED}" for name, module in latent if absorbs_packed(module)]

    def remarks(self, runner: Runner) -> Sequence[str]:
        """The reasons for which passes took transformers' own path."""
        return [f"took transformers' path: {reason}" for reason in sorted(_forward(runner).fallbacks)]


def _forward(runner: Runner) -> Any:
    return runner.model.get_decoder().__dict__["forward"]


def _unsuitable(config: Any) -> str | None:
    """Why layers of this configuration cannot be run, or None."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        windowed = ", ".join(sorted(kinds - {"full_attention"}))
        return f"it has layers of {windowed}; only full attention is done"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, SwiGLU needs silu"
    widest = max(getattr(config, "kv_lora_rank", None) or 0, config.head_dim)
    return None if widest <= 1024 else f"its heads have {widest} values, the kernels take at most 1024"


def _absorb(decoder: Any) -> Undo:
    """A dense copy of every packed `kv_b_proj` in a buffer, which absorption reads; kv_int8 may have made it."""
    from optimizations.cache.int8_attention import ABSORBED
    from optimizations.cache.kv_int8 import dense_weight

    made: list[Any] = []
    for module in decoder.modules():
        linear = getattr(module, "kv_b_proj", None)
        if linear is None or ABSORBED in module._buffers:
            continue
        weight = getattr(linear, "weight", None)
        if not (isinstance(weight, Tensor) and weight.is_floating_point()):
            dense = dense_weight(linear, module.kv_lora_rank, module)
            module.register_buffer(ABSORBED, dense, persistent=False)
            made.append(module)

    def undo() -> None:
        for module in made:
            delattr(module, ABSORBED)

    return undo
