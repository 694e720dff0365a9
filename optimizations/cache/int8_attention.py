"""The attention and mask functions that transformers calls by name while kv_int8 is in force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optimizations.cache.int8_layer import Int8Layer

NAME = "pio_int8_kv"


def register() -> None:
    """Makes the functions known to transformers under `NAME`; again is harmless."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, int8_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, int8_mask)


def int8_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Int8Layer,
    value: Tensor | Int8Layer,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; key and value are an `Int8Layer`, or tensors when there is no cache.

    Without a mask, query i of n sees everything but the last n - 1 - i tokens.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if not isinstance(key, Int8Layer):
        return _dense(module, query, key, value, attention_mask, dropout, scaling, causal, **kwargs)
    if dropout:
        raise RuntimeError("kv_int8 does not train: attention dropout is on; call model.eval()")
    if key.latent:
        return _latent(module, query, key, attention_mask, scaling, causal), None
    return key.attend(query, scaling, attention_mask, causal), None


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Any,
    mask: Tensor | None,
    dropout: float,
    scaling: float,
    causal: bool,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Without an int8 cache: transformers' own attention. Its causal flag counts from the first key, ours from the last."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    queries, length = query.shape[2], key.shape[2]
    if causal and queries != length:
        mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)[None, None]
        causal = False
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
    )


def _latent(
    module: Any, query: Tensor, layer: Int8Layer, mask: Tensor | None, scaling: float, causal: bool
) -> Tensor:
    """Absorbed latent attention: queries go into the latent space, results come out of it.

    k = W_k c and v = W_v c for a latent c, so q . k = (W_k^T q) . c and sum p v = W_v (sum p c): the history is never
    expanded. query [batch, heads, queries, nope + rope] -> [batch, queries, heads, v_head_dim].
    """
    batch, heads, tokens, _ = query.shape
    nope, rank = module.qk_nope_head_dim, module.kv_lora_rank
    weight = dense_kv_b(module).view(heads, nope + module.v_head_dim, rank)
    # Per head over all rows and tokens: a batched product over rows would copy the weight once per row.
    plain = query[..., :nope].transpose(0, 1).reshape(heads, batch * tokens, nope)
    into = torch.bmm(plain, weight[:, :nope]).view(heads, batch, tokens, rank).transpose(0, 1)
    gathered = layer.attend(into, scaling, mask, causal, query[..., nope:])
    by_head = gathered.permute(2, 0, 1, 3).reshape(heads, batch * tokens, rank)
    out = torch.bmm(by_head, weight[:, nope:].transpose(1, 2))
    return out.view(heads, batch, tokens, -1).permute(1, 2, 0, 3)


ABSORBED = "absorbed_kv_b"


def dense_kv_b(module: Any) -> Tensor:
    """The weight of `kv_b_proj`, [heads * (nope + v), rank]: the kept copy of a packed one, else its own."""
    kept = module._buffers.get(ABSORBED)
    return module.kv_b_proj.weight if kept is None else kept


def int8_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """None where causality is all there is to say, also over a history; else transformers' boolean mask."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = mask_function is causal_mask_function and allow_is_causal_skip
    at_the_end = q_offset + q_length == kv_offset + kv_length
    if plain and at_the_end and (attention_mask is None or bool(attention_mask[:, :kv_length].all())):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **kwargs,
    )
