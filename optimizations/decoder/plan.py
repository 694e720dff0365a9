"""Reads the modules of a decoder stack once, into the description that the native decoder runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from optimizations.cache.int8_attention import dense_kv_b
from optimizations.decoder.linears import Matrices
from optimizations.errors import Refusal
from optimizations.native.checks import DTYPE_CODES
from optimizations.native.loader import native
from optimizations.native.packed_heads import HEAD_PANEL, HEAD_ROWS
from optimizations.weights.integer_format import IntegerFormat
from optimizations.weights.packed_modules import PackedLinear

GROUPED = ("Qwen3Attention", "Qwen3MoeAttention", "Qwen3VLTextAttention")
LATENT = ("Glm4MoeLiteAttention",)
MLPS = ("Qwen3MLP", "Qwen3MoeMLP", "Qwen3VLTextMLP", "Glm4MoeLiteMLP")
MIXTURES = ("Qwen3MoeSparseMoeBlock", "Glm4MoeLiteMoE")
LAYERS = ("Qwen3DecoderLayer", "Qwen3MoeDecoderLayer", "Qwen3VLTextDecoderLayer", "Glm4MoeLiteDecoderLayer")


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What the cache of every layer holds per token: heads x (first, second) values; latents when `latent`."""

    heads: int
    first: int
    second: int
    latent: bool


# Per module: its id and the addresses of its tensors.
Ends = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The native decoder of one model, and what keeps its addresses valid."""

    decoder: Any
    tensors: tuple[Tensor, ...]
    dtype: torch.dtype
    hidden: int
    rope: int
    layers: int
    cache: CacheShape
    vocabulary: int  # of the native step from tokens to logits; 0: there is none
    ends: Ends  # table and output layer of that step

    def still_ends_in(self, table: Any, head: Any) -> bool:
        """Whether the native step looks up in this embedding and multiplies with this layer, as they are now."""
        return self.ends == _identities(table, head)


def build_plan(decoder: Any, head: Any = None) -> Plan:
    """The plan of a transformers decoder (`model.get_decoder()`).

    Args:
        head: the output layer (`model.get_output_embeddings()`), which a native step multiplies with.

    Raises:
        Refusal: a module is of a kind that the native decoder does not know; the module is named.
        NativeModuleMissing: the kernels are not built.
    """
    config, dtype = decoder.config, decoder.norm.weight.dtype
    matrices = Matrices(dtype)
    with torch.no_grad():
        layers = [_layer(f"layers.{i}", layer, config, matrices) for i, layer in enumerate(decoder.layers)]
        last = matrices.norm("norm", decoder.norm, config.hidden_size)
        ends = _ends(decoder.embed_tokens, head, config, matrices)
    shape = _cache_shape(config)
    rope = shape.second if shape.latent else config.head_dim
    kinds: Any = native().decoder
    model = kinds.Model(config.hidden_size, rope, DTYPE_CODES[dtype], last, layers, *ends)
    tensors = tuple(matrices.tensors)
    vocabulary = config.vocab_size if ends else 0
    return Plan(
        kinds.Decoder(model),
        tensors,
        dtype,
        config.hidden_size,
        rope,
        len(layers),
        shape,
        vocabulary,
        _identities(decoder.embed_tokens, head) if ends else (),
    )


def _identities(*modules: Any) -> Ends:
    return tuple(
        (id(module), *(t.data_ptr() for t in (*module.parameters(), *module.buffers()))) for module in modules
    )


def _ends(embedding: Any, head: Any, config: Any, matrices: Matrices) -> tuple[Any, ...]:
    """Table and output layer for native steps; nothing where one is of a kind that has to be called as a module."""
    shape = (config.vocab_size, config.hidden_size)
    try:
        return matrices.table("embed_tokens", embedding, *shape), matrices.linear("lm_head", head, *shape)
    except Refusal:
        return ()


def _cache_shape(config: Any) -> CacheShape:
    if getattr(config, "kv_lora_rank", None):
        return CacheShape(1, config.kv_lora_rank, config.qk_rope_head_dim, True)
    return CacheShape(config.num_key_value_heads, config.head_dim, config.head_dim, False)


def _known(name: str, module: Any, names: tuple[str, ...]) -> str:
    kind = type(module).__name__
    if kind not in names:
        raise Refusal(f"{name} is a {kind}; the native decoder knows {', '.join(names)}")
    if "forward" in module.__dict__:
        raise Refusal(f"the forward of {name} was replaced, and the native decoder would not call it")
    return kind


def _layer(name: str, layer: Any, config: Any, matrices: Matrices) -> Any:
    _known(name, layer, LAYERS)
    attention = _known(f"{name}.self_attn", layer.self_attn, GROUPED + LATENT)
    mlp = _known(f"{name}.mlp", layer.mlp, MLPS + MIXTURES)
    hidden = config.hidden_size
    read = _latent if attention in LATENT else _grouped
    described = read(f"{name}.self_attn", layer.self_attn, config, matrices)
    dense = _mlp(f"{name}.mlp", layer.mlp, hidden, matrices) if mlp in MLPS else None
    mixture = _mixture(f"{name}.mlp", layer.mlp, hidden, matrices) if mlp in MIXTURES else None
    return native().decoder.Layer(
        before_attention=matrices.norm(f"{name}.input_layernorm", layer.input_layernorm, hidden),
        before_feed_forward=matrices.norm(
            f"{name}.post_attention_layernorm", layer.post_attention_layernorm, hidden
        ),
        grouped=described if attention in GROUPED else None,
        latent=described if attention in LATENT else None,
        mlp=dense,
        mixture=mixture,
    )


def _grouped(name: str, attention: Any, config: Any, matrices: Matrices) -> Any:
    if getattr(attention, "sliding_window", None) is not None:
        raise Refusal(f"{name} attends to a sliding window; the native decoder does full attention")
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    hidden = config.hidden_size
    return native().decoder.Grouped(
        q=matrices.linear(f"{name}.q_proj", attention.q_proj, heads * dim, hidden),
        k=matrices.linear(f"{name}.k_proj", attention.k_proj, kv_heads * dim, hidden),
        v=matrices.linear(f"{name}.v_proj", attention.v_proj, kv_heads * dim, hidden),
        o=matrices.linear(f"{name}.o_proj", attention.o_proj, hidden, heads * dim),
        q_norm=matrices.norm(f"{name}.q_norm", attention.q_norm, dim),
        k_norm=matrices.norm(f"{name}.k_norm", attention.k_norm, dim),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        scaling=attention.scaling,
    )


def _latent(name: str, a: Any, config: Any, matrices: Matrices) -> Any:
    hidden, heads, rank, rope = config.hidden_size, a.num_heads, a.kv_lora_rank, a.qk_rope_head_dim
    low = a.q_lora_rank
    kv_norm = matrices.norm(f"{name}.kv_a_layernorm", a.kv_a_layernorm, rank)
    expansion = heads * (a.qk_nope_head_dim + a.v_head_dim)
    q_a = None if low is None else matrices.linear(f"{name}.q_a_proj", a.q_a_proj, low, hidden)
    q = ("q_proj", a.q_proj) if low is None else ("q_b_proj", a.q_b_proj)
    dense = matrices.address(f"{name}.kv_b_proj", dense_kv_b(a).detach(), (expansion, rank))
    return native().decoder.Latent(
        q_a=q_a,
        q_norm=kv_norm if low is None else matrices.norm(f"{name}.q_a_layernorm", a.q_a_layernorm, low),
        q=matrices.linear(f"{name}.{q[0]}", q[1], heads * a.qk_head_dim, low or hidden),
        kv_a=matrices.linear(f"{name}.kv_a_proj_with_mqa", a.kv_a_proj_with_mqa, rank + rope, hidden),
        kv_b=matrices.linear(f"{name}.kv_b_proj", a.kv_b_proj, expansion, rank),
        o=matrices.linear(f"{name}.o_proj", a.o_proj, hidden, heads * a.v_head_dim),
        kv_norm=kv_norm,
        kv_b_dense=dense,
        heads=heads,
        nope=a.qk_nope_head_dim,
        rope=rope,
        v=a.v_head_dim,
        rank=rank,
        neighbours=bool(config.rope_interleave),
        by_head=absorbs_packed(a),
        scaling=a.scaling,
    )


def absorbs_packed(attention: Any) -> bool:
    """Whether few queries are absorbed by `kv_b_proj` as it is packed, so that decoding does not read its dense copy."""
    halves = (attention.qk_nope_head_dim, attention.v_head_dim)
    fits = all(rows % HEAD_PANEL == 0 and rows <= HEAD_ROWS for rows in halves)
    packed = attention.kv_b_proj
    return fits and isinstance(packed, PackedLinear) and isinstance(packed.format, IntegerFormat)


def _mlp(name: str, mlp: Any, hidden: int, matrices: Matrices) -> Any:
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise Refusal(
            f"{name} has the activation {type(mlp.act_fn).__name__}; natively there is SwiGLU alone"
        )
    inner = mlp.intermediate_size
    return native().decoder.Mlp(
        gate=matrices.linear(f"{name}.gate_proj", mlp.gate_proj, inner, hidden),
        up=matrices.linear(f"{name}.up_proj", mlp.up_proj, inner, hidden),
        down=matrices.linear(f"{name}.down_proj", mlp.down_proj, hidden, inner),
    )


def _mixture(name: str, block: Any, hidden: int, matrices: Matrices) -> Any:
    router, experts = block.gate, block.experts
    _known(f"{name}.gate", router, ("Qwen3MoeTopKRouter", "Glm4MoeLiteTopkRouter"))
    count, inner = experts.num_experts, experts.intermediate_dim
    shared = getattr(block, "shared_experts", None)
    return native().decoder.Mixture(
        router=_router(f"{name}.gate", router, count, hidden, matrices),
        experts=matrices.experts(f"{name}.experts", experts, count, hidden, inner),
        shared=None if shared is None else _mlp(f"{name}.shared_experts", shared, hidden, matrices),
    )


def _router(name: str, router: Any, count: int, hidden: int, matrices: Matrices) -> Any:
    softmax = not hasattr(router, "e_score_correction_bias")
    # transformers multiplies in the model's dtype before a softmax, in float32 before sigmoids.
    dtype = matrices.dtype if softmax else torch.float32
    weight = matrices.address(f"{name}.weight", router.weight.detach().to(dtype), (count, hidden), dtype)
    correction = 0
    if not softmax:
        bias = router.e_score_correction_bias.detach().float()
        correction = matrices.address(f"{name}.e_score_correction_bias", bias, (count,), torch.float32)
    return native().decoder.Router(
        weight,
        correction,
        top_k=router.top_k,
        groups=getattr(router, "num_group", 1),
        top_groups=getattr(router, "topk_group", 1),
        softmax=softmax,
        normalize=bool(router.norm_topk_prob),
        scale=float(getattr(router, "routed_scaling_factor", 1.0)),
    )
