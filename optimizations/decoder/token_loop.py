"""The loop of generate() for greedy and sampled decoding: per token one decoder step and the output layer, nothing else.

transformers' own loop prepares keyword arguments, positions and masks anew for every token, goes through the model's
wrappers and searches the largest logit with torch.argmax: 1.3 ms per token over 151,936 logits, and 1.7 more where a minimal length
is asked for. Here they are kept from step to step. What the caller brought is called as transformers calls it: logits
processors, stopping criteria, the streamer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks
from transformers.generation.utils import GenerateDecoderOnlyOutput

from optimizations.decoder.forward import NativeForward
from optimizations.decoder.steps import Steps
from optimizations.decoder.stopping import Stopping
from optimizations.decoder.token_choice import TokenChoice
from optimizations.decoder.token_ids import TokenIds
from optimizations.forwards import IDLE_WITH_CACHE

# Models whose forward is the decoder and then the output layer, for tokens after the prompt.
WRAPPERS = (
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3VLForConditionalGeneration",
    "Glm4MoeLiteForCausalLM",
)
PREPARING = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


def unsuitable(model: Any, forward: NativeForward, config: Any, inputs: dict[str, Any]) -> str | None:
    """Why a generation is left to transformers' loop, or None.

    Args:
        forward: what stands in the place of the decoder's forward.
        config: the generation's configuration.
        inputs: the model's keyword arguments before the prompt is read.
    """
    if type(model).__name__ not in WRAPPERS:
        return f"the model is a {type(model).__name__}; known: {', '.join(WRAPPERS)}"
    if config.output_attentions or config.output_hidden_states:
        return "attention maps or hidden states are wanted"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses dtypes"
    if not inputs.get("use_cache") or inputs.get("past_key_values") is None:
        return "there is no cache"
    return _watched(model, forward) or forward.refuses(inputs["past_key_values"])


def _watched(model: Any, forward: NativeForward) -> str | None:
    """Who else wants to see every pass through the model, or None."""
    outer = [model] if model.base_model is forward.decoder else [model, model.base_model]
    if (
        any("forward" in module.__dict__ for module in outer)
        or forward.decoder.__dict__["forward"] is not forward
    ):
        return "the forward of the model was replaced"
    if any(name in model.__dict__ for name in PREPARING):
        return "the preparation of its inputs was replaced"
    hooked = has_global_hooks() or any(
        module._forward_hooks
        or not all(getattr(hook, IDLE_WITH_CACHE, False) for hook in module._forward_pre_hooks.values())
        for module in (*outer, forward.decoder)
    )
    return "a hook waits for passes through the model" if hooked else None


def generate_tokens(
    model: Any,
    forward: NativeForward,
    ids: Tensor,
    choice: TokenChoice,
    stopping: Stopping,
    config: Any,
    streamer: Any,
    inputs: dict[str, Any],
) -> Any:
    """What transformers' `_sample` returns: token ids int64 [B, prompt + new], or its output object.

    Args:
        ids: int64 [B, prompt].
        inputs: the model's keyword arguments for the prompt, with the cache; `unsuitable` has nothing against them.
    """
    recorded = config.return_dict_in_generate
    scored: tuple[Tensor, ...] | None = () if recorded and config.output_scores else None
    raw: tuple[Tensor, ...] | None = () if recorded and config.output_logits else None
    output = model._prefill(ids, config, inputs, is_first_iteration=not config.is_assistant)
    steps = Steps(model, forward, model._update_model_kwargs_for_generation(output, inputs))
    # A copy: where logits of the whole prompt were asked for, a view would keep them.
    logits: Tensor | None = output.logits[:, -1].clone()
    del output
    keep = scored is not None or raw is not None
    text, at_once = TokenIds(ids), steps.native and not (keep or choice.computes)
    while True:
        if logits is None:
            last = steps.greedy(text, choice.forbidden(text.length))
        else:
            scores = choice.scores(text.all(), logits, keep)
            scored = scored if scored is None else (*scored, scores)
            raw = raw if raw is None else (*raw, logits.to(torch.float32, copy=True))
            text.append(choice.tokens(scores))
            last = text.last().tolist()
        if stopping.pads and any(stopping.ended):
            last = _padded(text, last, stopping.ended, int(config._pad_token_tensor))
        done = stopping(text, last, scored)
        if streamer is not None:
            streamer.put(text.last())
        if done:
            break
        logits = None if at_once else steps.logits(last)
    if streamer is not None:
        streamer.end()
    sequences = text.all().clone()
    if not recorded:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences, scores=scored, logits=raw, past_key_values=steps.cache
    )


def _padded(text: TokenIds, last: list[int], ended: list[bool], padding: int) -> list[int]:
    """Rows that were done before get padding for their last token; all rows' last tokens."""
    for row in [row for row, over in enumerate(ended) if over]:
        text.replace_last(row, padding)
    return [padding if over else token for token, over in zip(last, ended, strict=True)]
