"""What runs in the place of the decoder's `forward`: one native call, or transformers' own path with a word why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from optimizations.decoder.cache import Memory, NativeCache, usable
from optimizations.decoder.masks import Mask, read_mask
from optimizations.decoder.plan import Plan
from optimizations.decoder.positions import Angles, Turned, rotary_positions
from optimizations.native.loader import native

logger = logging.getLogger(__name__)

# Arguments that say nothing to the decoder itself, whatever their value.
IGNORED = ("return_dict", "cache_position", "mm_token_type_ids", "debug_io", "debug_io_dir")
RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")
MIXTURES = ("Qwen3MoeModel", "Glm4MoeLiteModel")


class NativeForward:
    """`forward` of one decoder; `original` is transformers' own, for what cannot be done natively."""

    def __init__(self, decoder: Any, plan: Plan, original: Callable[..., Any]) -> None:
        self.decoder, self.plan, self.original = decoder, plan, original
        self.fallbacks: set[str] = set()  # reasons already given
        self.memory = Memory(plan)
        self.angles = Angles(decoder, plan.dtype, plan.rope)
        self._nothing_visual = native().decoder.Visual([], [])
        mixture = type(decoder).__name__ in MIXTURES
        self._output: Any = MoeModelOutputWithPast if mixture else BaseModelOutputWithPast

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        visual_pos_masks: Tensor | None = None,
        deepstack_visual_embeds: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        wants_cache = self.decoder.config.use_cache if use_cache is None else use_cache
        reason = self._reason(past_key_values, kwargs) or _odd_inputs(
            input_ids, attention_mask, position_ids, past_key_values, wants_cache
        )
        if reason is None:
            x = self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            cache = past_key_values
            if cache is None:
                cache = NativeCache(self.plan.layers) if wants_cache else NativeCache(1, room=0)
            visual = (visual_pos_masks, deepstack_visual_embeds)
            done = self._pass(x, attention_mask, position_ids, cache, visual)
            if not isinstance(done, str):
                return self._result(done, cache if wants_cache else past_key_values, kwargs)
            reason = done
        self._say_once(reason)
        if visual_pos_masks is not None:
            kwargs |= {
                "visual_pos_masks": visual_pos_masks,
                "deepstack_visual_embeds": deepstack_visual_embeds,
            }
        return self.original(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _result(self, hidden: Tensor, cache: Any, kwargs: dict[str, Any]) -> Any:
        output = self._output(last_hidden_state=hidden, past_key_values=cache)
        wanted = kwargs.get("return_dict")
        as_tuple = not self.decoder.config.return_dict if wanted is None else not wanted
        return output.to_tuple() if as_tuple else output

    def refuses(self, cache: Any) -> str | None:
        """Why a pass over tokens without a mask and with this cache takes transformers' path, or None."""
        return self._reason(cache, {})

    def _reason(self, cache: Any, kwargs: dict[str, Any]) -> str | None:
        """Why transformers' path has to be taken, judged by everything but the inputs; None when it need not."""
        if torch.is_grad_enabled():
            return "gradients are enabled and the kernels have none; use torch.inference_mode() or torch.no_grad()"
        if self.decoder.training:
            return "the model is in training mode; call model.eval()"
        if torch.compiler.is_compiling():
            return "torch.compile is tracing the model"
        if cache is not None and not usable(cache, self.plan):
            kind = type(cache).__name__
            return f"a {kind} was passed as past_key_values; leave it out, the native cache is made by itself"
        config = self.decoder.config
        for name in RECORDED:
            if kwargs.get(name, getattr(config, name, False)):
                return f"{name} is set, and layers inside the native call cannot be recorded"
        if kwargs and (named := _unknown(kwargs)):
            return f"it does not know the argument {named}"
        return None if getattr(config, "is_causal", True) else "the attention of this model is not causal"

    def _say_once(self, reason: str) -> None:
        if reason not in self.fallbacks:
            self.fallbacks.add(reason)
            logger.warning("native_decoder takes transformers' own path: %s", reason)

    def _pass(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any, visual: tuple[Any, Any]
    ) -> Tensor | str:
        """Hidden states after the last norm, or why the inputs cannot be taken. The cache grows when all is done."""
        if odd := self._odd(x):
            return odd
        batch, tokens = x.shape[0], x.shape[1]
        start: int = cache.layers[0].length
        seen = read_mask(mask, batch, tokens, start + tokens)
        if isinstance(seen, str):
            return seen
        angles = (
            self.angles.at(start, tokens)
            if positions is None
            else self.angles.of(rotary_positions(positions))
        )
        shown, kept = self._visual(*visual) if visual[1] else (None, None)
        out = self.run(x, seen, angles, cache, shown)
        del kept  # its memory was read until here
        return out

    def run(self, x: Tensor, seen: Mask, angles: Turned, cache: Any, shown: Any = None) -> Tensor:
        """Hidden states after the last norm for embeddings x, both [B, tokens, hidden]. The cache grows when all is done.

        Args:
            angles: as `Angles` gives them for these tokens.
            shown: the native description of DeepStack's inputs, or None.
        """
        if odd := self._odd(x):
            raise ValueError(f"native_decoder: {odd}")
        batch, tokens = x.shape[0], x.shape[1]
        start: int = cache.layers[0].length
        memory = self.memory.of(cache, batch, tokens)
        x = x.contiguous()
        out = torch.empty_like(x)
        self.plan.decoder.run(
            memory,
            shown or self._nothing_visual,
            x.data_ptr(),
            out.data_ptr(),
            *angles[:3],
            0 if seen.seen is None else seen.seen.data_ptr(),
            seen.batch,
            seen.query,
            seen.causal,
            batch,
            tokens,
            start,
            torch.get_num_threads(),
        )
        for layer in cache.layers:
            layer.length = start + tokens
        return out

    def _odd(self, x: Tensor) -> str | None:
        """Why these embeddings cannot be taken."""
        if x.dtype == self.plan.dtype and x.is_cpu and x.numel():
            return None
        return (
            f"inputs of shape {tuple(x.shape)} in {x.dtype} on {x.device}; it takes {self.plan.dtype} on cpu"
        )

    def _visual(self, where: Tensor, embeds: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """DeepStack: which rows gain what after the first layers, and the tensors that hold it."""
        rows = where.reshape(-1).nonzero().reshape(-1).tolist()
        held = [each.to(self.plan.dtype).contiguous() for each in embeds]
        for each in held:
            if tuple(each.shape) != (len(rows), self.plan.hidden):
                raise ValueError(
                    f"deepstack_visual_embeds must have shape ({len(rows)}, {self.plan.hidden}), one row per visual "
                    f"token, got {tuple(each.shape)}"
                )
        return native().decoder.Visual(rows, [each.data_ptr() for each in held]), held


def _unknown(kwargs: dict[str, Any]) -> str | None:
    """An argument that may change what is computed."""
    if kwargs.get("is_causal") is False:
        return "is_causal=False"
    known = (*IGNORED, *RECORDED, "is_causal")
    return next((key for key, value in kwargs.items() if key not in known and value is not None), None)


def _odd_inputs(
    input_ids: Tensor | None, mask: Any, positions: Tensor | None, cache: Any, wants_cache: bool
) -> str | None:
    """Inputs whose meaning transformers derives in a way of its own."""
    if mask is not None and not isinstance(mask, Tensor):
        return f"the attention mask is a {type(mask).__name__}"
    # Positions that start again say that several sequences lie in one row.
    alone = mask is None and cache is None and not wants_cache
    if alone and positions is not None and positions.dim() == 2 and bool((positions.diff(dim=-1) != 1).any()):
        return "several sequences packed into one row"
    if input_ids is not None and input_ids.dim() != 2:
        return f"input_ids of {input_ids.dim()} dimensions"
    return None
