"""fused_ops: the small operations between the matrix products, one kernel call each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from optimizations.contract import (
    ROUNDING_BUDGET,
    AccuracyBudget,
    Fidelity,
    Kind,
    Optimization,
    Target,
    Undo,
)
from optimizations.forwards import attention_interface, replace_forwards
from optimizations.native.fused import add_rms_norm, norm_rope, rms_norm, swiglu
from optimizations.native.loader import native
from optimizations.vision.tower import TOWER

if TYPE_CHECKING:
    from optimizations.runner import Runner

MODEL_TYPES = ("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_text", "glm4_moe_lite")
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class FusedOps(Optimization):
    """Residual addition + RMSNorm, QK-norm + rotary embedding, SwiGLU: each one C++ call instead of 3 to 20 torch ops.

    At batch 1 a decoder layer of transformers runs about 100 small torch operations (views included) around
    its 7 matrix products, microseconds of dispatch each; 40 of them become 5 calls of 6 to 12 us, a few of
    which are arithmetic. The rotary call covers Qwen3's halves, Qwen3-VL's M-RoPE (mixed into cos and sin by
    the model's rotary module) and GLM's interleaved part of a head, and writes head-major, as attention
    reads. Linear layers are only called, never read, so packed weights compose. In Qwen3-VL's vision tower the
    rotation, GELU and (on AVX-512) attention are one call each, and the patch embedding, a convolution of one patch
    each, becomes the matrix product that it is.

    Bound: every intermediate is rounded to the model's dtype where transformers rounds it, the variance is
    float32; only the order of that sum differs, so outputs are nearly all equal and at most two units in the
    last place away. The kernels have no gradient: with gradients enabled every module takes transformers' own
    path, whose gradients are exact.

    Source: SGLang's CPU backend (fused QK-norm + RoPE), Liger Kernel (arXiv 2410.10989), kernels-community
    RMSNorm.
    """

    name: ClassVar[str] = "fused_ops"
    kind: ClassVar[Kind] = Kind.COMPUTE
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING
    summary: ClassVar[str] = "add+RMSNorm, QK-norm+RoPE and SwiGLU as one C++ call each"
    source: ClassVar[str] = "SGLang CPU backend; Liger Kernel (arXiv 2410.10989)"
    budget: ClassVar[AccuracyBudget] = ROUNDING_BUDGET
    differentiable: ClassVar[bool] = True

    def refusal(self, target: Target) -> str | None:
        if target.model_type not in MODEL_TYPES:
            return f"its layers are not known; known: {', '.join(MODEL_TYPES)}"
        if target.device != "cpu":
            return f"the kernels run on the CPU and the model is on {target.device}; use torch_compile there"
        if target.dtype not in DTYPES:
            return f"the kernels compute in {' or '.join(DTYPES)}, the model is in {target.dtype}"
        activation = target.config.get_text_config(decoder=True).hidden_act
        return None if activation == "silu" else f"its activation is {activation}, SwiGLU needs silu"

    def apply(self, runner: Runner) -> Undo:
        native()  # a missing build is an error now, not in the middle of a generation
        return replace_forwards(runner.model, REPLACEMENTS, self.name)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def _decoder_layer(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Norm, attention, add + norm, feed-forward, add. Further arguments are the attention's."""
    normed = _normed(layer.input_layernorm, hidden_states)
    attended, _ = layer.self_attn(normed, *args, **kwargs)
    after = layer.post_attention_layernorm
    residual, normed = add_rms_norm(attended, hidden_states, after.weight, after.variance_epsilon)
    return residual + layer.mlp(normed)


def _named_arguments_first(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """The argument order of Qwen3, Qwen3-MoE and GLM layers."""
    return _decoder_layer(
        layer,
        hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )


def _positions_first(
    layer: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    **kwargs: Any,
) -> Tensor:
    """The argument order of Qwen3-VL's text layers."""
    return _named_arguments_first(
        layer,
        hidden_states,
        attention_mask,
        position_ids,
        past_key_values,
        use_cache,
        position_embeddings,
        **kwargs,
    )


def _finish(attention: Any, q: Tensor, k: Any, v: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
    """Attention proper and the output projection, as the original modules call them."""
    if hasattr(attention, "sliding_window"):
        kwargs["sliding_window"] = attention.sliding_window
    dropout = attention.attention_dropout if attention.training else 0.0
    out, weights = attention_interface(attention)(
        attention, q, k, v, mask, dropout=dropout, scaling=attention.scaling, **kwargs
    )
    batch, tokens = q.shape[0], q.shape[2]
    return attention.o_proj(out.reshape(batch, tokens, -1).contiguous()), weights


def _qwen_attention(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    cos, sin = position_embeddings
    q_norm, k_norm = attention.q_norm, attention.k_norm
    q = attention.q_proj(hidden_states).view(shape)
    k = attention.k_proj(hidden_states).view(shape)
    q = norm_rope(q, q_norm.weight, cos, sin, q_norm.variance_epsilon)
    keys: Any = norm_rope(k, k_norm.weight, cos, sin, k_norm.variance_epsilon)
    values: Any = attention.v_proj(hidden_states).view(shape).transpose(1, 2)
    if past_key_values is not None:
        keys, values = past_key_values.update(keys, values, attention.layer_idx)
    return _finish(attention, q, keys, values, attention_mask, kwargs)


def _latent_attention(
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """GLM's multi-head latent attention: norms on the latents, rotation of the rotary part alone."""
    batch, tokens = hidden_states.shape[:-1]
    cos, sin = position_embeddings
    neighbours = attention.config.rope_interleave
    if attention.q_lora_rank is None:
        q = attention.q_proj(hidden_states)
    else:
        q = attention.q_b_proj(_normed(attention.q_a_layernorm, attention.q_a_proj(hidden_states)))
    q = norm_rope(q.view(batch, tokens, -1, attention.qk_head_dim), None, cos, sin, 0.0, neighbours)
    compressed = attention.kv_a_proj_with_mqa(hidden_states)
    rank = attention.kv_lora_rank
    latents: Any = _normed(attention.kv_a_layernorm, compressed[..., :rank]).view(batch, 1, tokens, rank)
    turned: Any = norm_rope(compressed[..., rank:].unsqueeze(2), None, cos, sin, 0.0, neighbours)
    if past_key_values is not None:
        latents, turned = past_key_values.update(latents, turned, attention.layer_idx)
    keys, values = attention.expand_kv(latents, turned)
    return _finish(attention, q, keys, values, attention_mask, kwargs)


def _feed_forward(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


# Class name of a transformers module -> what runs in its place. Inner norms are called by the layers and attentions
# above; the class itself is here for the last norm of the model.
REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "Qwen3DecoderLayer": _named_arguments_first,
    "Qwen3MoeDecoderLayer": _named_arguments_first,
    "Glm4MoeLiteDecoderLayer": _named_arguments_first,
    "Qwen3VLTextDecoderLayer": _positions_first,
    "Qwen3Attention": _qwen_attention,
    "Qwen3MoeAttention": _qwen_attention,
    "Qwen3VLTextAttention": _qwen_attention,
    "Glm4MoeLiteAttention": _latent_attention,
    "Qwen3MLP": _feed_forward,
    "Qwen3MoeMLP": _feed_forward,
    "Qwen3VLTextMLP": _feed_forward,
    "Glm4MoeLiteMLP": _feed_forward,
    "Qwen3RMSNorm": _normed,
    "Qwen3MoeRMSNorm": _normed,
    "Qwen3VLTextRMSNorm": _normed,
    "Glm4MoeLiteRMSNorm": _normed,
    **TOWER,
}
