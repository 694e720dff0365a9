"""kv_int8: keys and values in int8, read as they are by the attention kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from optimizations.contract import AccuracyBudget, Fidelity, Kind, Optimization, Target, Undo
from optimizations.errors import InvalidSpec
from optimizations.forwards import IDLE_WITH_CACHE
from optimizations.native.loader import native

if TYPE_CHECKING:
    from optimizations.cache.int8_layer import Int8Cache
    from optimizations.runner import Runner

GROUPED = ("Qwen3Attention", "Qwen3MoeAttention", "Qwen3VLTextAttention")
LATENT = ("Glm4MoeLiteAttention",)
MODEL_TYPES = ("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_text", "glm4_moe_lite")
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class KVInt8(Optimization):
    """The KV cache in int8 with one scale per token and head; attention reads the codes, no dequantized history exists.

    Symmetric, scale = max |x| / 127, error at most scale / 2 per value: d + 4 bytes per token and head
    instead of 2 d, 52 % of bfloat16 at d = 128. KIVI scales keys per channel, because a few channels are much
    larger than the rest; that needs groups of tokens and a window in full precision. Here `equalize` divides
    each channel by its weight in the key norm first (the larger of the two that rotate together), and the
    query is multiplied instead: the norm has made the rest alike, so this takes out the same outliers and
    stays append-only. Relative error of scores, normed and rotated keys of d = 128 with log-normal norm
    weights of sigma 0 / 0.5 / 1: per token 0.65 / 0.87 / 1.55 %, equalized 0.65 / 0.72 / 0.78 %, per channel
    in groups of 32 0.53 / 0.57 / 0.60 %.

    Latents are divided by the largest value that each channel takes over 64 seeded random tokens, in one forward pass
    while the technique is applied: the norm's weight does not show that a channel is nearly constant and ten times the
    others, as in the reference, where it costs all others three bits (KL 0.0153 nats by the weight, 0.0013
    measured, 0.0015 with a scale per 64 values, which would take 5 % more memory). The pass raises the peak of a
    process over the reference by 20 MB, torch's products of another shape; hooks of the decoder see it.

    For GLM's latent attention the cache holds int8 latents and rotary keys, shared by all heads, and queries
    are absorbed into the latent space (kv_b_proj split in two), so the history is never expanded;
    transformers expands it at every step. A packed kv_b_proj keeps a dense copy of its weight for this: 431
    MB in bfloat16 at full scale.

    Memory grows by a quarter when full, so a token is copied four times at most; crop, beam reordering and
    batch selection work. Prompts, too, see the int8 keys. Numerics: against exact attention over the rounded
    cache, relative error 2^-14 of a row's largest element plus the output's own rounding. No gradient;
    backward() says so.

    Source: KIVI (arXiv 2402.02750); onnxruntime #28695 (tiled CPU attention over int8 KV); DeepSeek-V2 (arXiv
    2405.04434) for absorption.
    """

    equalize: bool = True

    name: ClassVar[str] = "kv_int8"
    kind: ClassVar[Kind] = Kind.CACHE
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    summary: ClassVar[str] = "int8 KV cache that attention reads directly; half the bytes per token"
    source: ClassVar[str] = "KIVI (arXiv 2402.02750); DeepSeek-V2 (arXiv 2405.04434)"
    # Measured on the trained references, 4,096 held-out tokens: dense and VL KL 5e-4 nats, top-1 0.985; coder 5e-3,
    # 0.976, whose routers choose other experts at the least rounding; GLM 1.3e-3, 0.983.
    budget: ClassVar[AccuracyBudget] = AccuracyBudget(0.01, 0.96, 1.01, 0.02)
    conflicts: ClassVar[Mapping[str, str]] = {
        "torch_compile": "it compiles for transformers' static cache, and an int8 cache grows",
        "continuous_batching": "transformers' engine keeps its own paged cache",
    }

    def __post_init__(self) -> None:
        if not isinstance(self.equalize, bool):
            raise InvalidSpec(f"kv_int8: equalize must be true or false, got {self.equalize!r}")

    @classmethod
    def search_space(cls) -> dict[str, Sequence[Any]]:
        return {"equalize": (True, False)}

    def refusal(self, target: Target) -> str | None:
        if target.model_type not in MODEL_TYPES:
            return f"its attention is not known; known: {', '.join(MODEL_TYPES)}"
        if target.device != "cpu":
            return f"the kernel runs on the CPU and the model is on {target.device}"
        if target.dtype not in DTYPES:
            return f"the kernel takes {' or '.join(DTYPES)}, the model is in {target.dtype}"
        return _unsuitable(target.config.get_text_config(decoder=True))

    def apply(self, runner: Runner) -> Undo:
        from optimizations.cache import int8_attention

        native()  # a missing build is an error now, not in the middle of a generation
        int8_attention.register()
        decoder = runner.model.get_decoder()
        found = [module for module in decoder.modules() if type(module).__name__ in GROUPED + LATENT]
        attentions = sorted(found, key=lambda module: module.layer_idx)
        make = functools.partial(_make_cache, _layer_settings(decoder, attentions, self.equalize))
        undos: list[Undo] = []

        def undo() -> None:
            while undos:
                undos.pop()()

        try:
            for config in {id(part.config): part.config for part in (decoder, *attentions)}.values():
                undos.append(_use_attention(config, int8_attention.NAME))
            for part in attentions:
                if type(part).__name__ in LATENT:
                    undos.append(_absorb(part))
            undos.append(_in_generate(runner.model, make))
            undos.append(_in_forward(decoder, make))
        except BaseException:
            undo()
            raise
        return undo


def _unsuitable(config: Any) -> str | None:
    """Why attention of these dimensions cannot be done, or None."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return (
            f"it has layers of {', '.join(sorted(kinds - {'full_attention'}))}; only full attention is done"
        )
    latent = getattr(config, "kv_lora_rank", None)
    dims = (latent, config.qk_rope_head_dim) if latent else (config.head_dim,)
    if any(dim % 4 or dim > 1024 for dim in dims):
        return f"cached heads must have a multiple of 4 values, at most 1024; it has {dims}"
    return None


def _use_attention(config: Any, name: str) -> Undo:
    before = config._attn_implementation_internal
    config._attn_implementation_internal = name

    def undo() -> None:
        config._attn_implementation_internal = before

    return undo


def _absorb(attention: Any) -> Undo:
    """Latents pass `expand_kv` unexpanded; a packed `kv_b_proj` leaves its dense weight in a buffer."""
    from optimizations.cache.int8_attention import ABSORBED
    from optimizations.cache.int8_layer import Int8Layer

    original = attention.expand_kv

    def expand_kv(kv_nope: Any, k_rot: Any) -> Any:
        if isinstance(kv_nope, Int8Layer):
            return kv_nope, kv_nope
        return original(kv_nope, k_rot)

    weight = getattr(attention.kv_b_proj, "weight", None)
    packed = not (isinstance(weight, Tensor) and weight.is_floating_point())
    if packed:
        dense = dense_weight(attention.kv_b_proj, attention.kv_lora_rank, attention)
        attention.register_buffer(ABSORBED, dense, persistent=False)
    attention.__dict__["expand_kv"] = expand_kv

    def undo() -> None:
        del attention.__dict__["expand_kv"]
        if packed:
            delattr(attention, ABSORBED)

    return undo


@torch.no_grad()
def dense_weight(linear: Any, columns: int, attention: Any) -> Tensor:
    """[rows, columns] of a packed linear layer, from `dequantize()` or by multiplying the identity."""
    dtype = attention.kv_a_layernorm.weight.dtype
    if hasattr(linear, "dequantize"):
        dense = linear.dequantize()
        return (dense if isinstance(dense, Tensor) else dense["weight"]).to(dtype)
    return linear(torch.eye(columns, dtype=dtype)).T.contiguous()


def _layer_settings(decoder: Any, attentions: Sequence[Any], equalize: bool) -> list[dict[str, Any]]:
    """What the `Int8Layer` of each attention needs to know."""
    from optimizations.cache.channel_scale import from_norm, measured

    latent = [type(attention).__name__ in LATENT for attention in attentions]
    channels: Sequence[Tensor | None] = [None] * len(attentions)
    if equalize:
        channels = measured(decoder) if all(latent) else [from_norm(one.k_norm.weight) for one in attentions]
    return [{"key_channel": channel, "latent": kind} for channel, kind in zip(channels, latent, strict=True)]


def _make_cache(settings: list[dict[str, Any]]) -> Int8Cache:
    from optimizations.cache.int8_layer import Int8Cache, Int8Layer

    return Int8Cache([Int8Layer(**one) for one in settings])


def _in_generate(model: Any, make: Any) -> Undo:
    """`generate` makes int8 caches where it would have made its default one; a cache the caller brings stays."""
    from transformers.cache_utils import DynamicCache

    original = model._prepare_cache_for_generation

    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        brought = model_kwargs.get("past_key_values")
        original(generation_config, model_kwargs, *args, **kwargs)
        if brought is None and type(model_kwargs.get("past_key_values")) is DynamicCache:
            model_kwargs["past_key_values"] = make()

    model.__dict__["_prepare_cache_for_generation"] = prepare

    def undo() -> None:
        del model.__dict__["_prepare_cache_for_generation"]

    return undo


def _in_forward(decoder: Any, make: Any) -> Undo:
    """A plain forward with `use_cache` gets an int8 cache too."""

    def give_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted = kwargs.get("use_cache")
        wanted = module.config.use_cache if wanted is None else wanted
        if wanted and not module.training and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = make()
        return args, kwargs

    setattr(give_cache, IDLE_WITH_CACHE, True)
    return decoder.register_forward_pre_hook(give_cache, with_kwargs=True).remove
