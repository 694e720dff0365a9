"""How large each channel of a cached head is: what keys and latents are divided by before they are quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

# Channels below this share of the largest are divided by the share instead: their codes stay small.
SMALLEST = 1e-3
# Tokens of the measuring pass. GLM's reference, KL from stock bf16 with the largest of 64, 256, 1,024 random tokens, four
# seeds each: 0.0011 to 0.0014 nats; of 1,024 tokens of text 0.0011; by the norm's weight 0.0153.
TOKENS, SEED = 64, 0


def from_norm(weight: Tensor) -> Tensor | None:
    """float32 [d], largest 1, for keys normed with `weight` [d] and then rotated in halves.

    Rotary halves i and i + d/2 mix, so both take the larger. None when all channels are alike.
    """
    return _relative(weight.detach().float().abs().view(2, -1).amax(0).repeat(2))


@torch.no_grad()
def measured(decoder: Any) -> list[Tensor | None]:
    """float32 [d] per layer, largest 1, for what transformers caches first: the largest over `TOKENS` random tokens (seed `SEED`).

    For latents, whose norm says little: a channel may be nearly constant and ten times the others, with a weight like
    theirs. Hooks of the decoder see this pass.
    """
    vocabulary = decoder.config.vocab_size
    ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(SEED))
    cache = DynamicCache(config=decoder.config)
    training = [module for module in decoder.modules() if module.training]
    try:
        decoder.eval()
        decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    finally:
        for module in training:
            module.training = True
    return [_relative(layer.keys.float().abs().amax((0, 1, 2))) for layer in cache.layers]


def _relative(size: Tensor) -> Tensor | None:
    largest = size.max()
    if not (largest > 0 and torch.isfinite(largest)):
        return None
    scale = (size / largest).clamp_min(SMALLEST).contiguous()
    return None if bool((scale == 1).all()) else scale
