"""Decoding steps: one token for every row of a batch after another, with all that stays between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizations.decoder.forward import NativeForward
from optimizations.decoder.masks import GrowingMask, Mask
from optimizations.decoder.positions import Turned, next_position
from optimizations.decoder.token_ids import TokenIds


class Steps:
    """What follows a prompt that went through the model: cache, mask and positions are kept from step to step.

    Args:
        model: the model, whose decoder computes `forward`.
        inputs: the model's keyword arguments for the first token after the prompt, the cache among them.
    """

    def __init__(self, model: Any, forward: NativeForward, inputs: dict[str, Any]) -> None:
        self.cache = inputs["past_key_values"]
        self._forward, self._plan = forward, forward.plan
        self._embed = forward.decoder.embed_tokens
        self._head = model.get_output_embeddings()
        self._mask = GrowingMask(inputs.get("attention_mask"))
        self._position = next_position(inputs.get("position_ids"), self.cache.get_seq_length())
        ends = (self._embed, self._head)
        self.native = self._plan.still_ends_in(*ends) and not any(_watched(end) for end in ends)

    def greedy(self, text: TokenIds, forbidden: list[int]) -> list[int]:
        """Appends to `text` the likeliest tokens after its last ones, and returns them; needs `native`."""
        text.reserve()
        start, seen, angles = self._here()
        chosen: list[int] = self._plan.decoder.greedy(
            self._forward.memory.of(self.cache, text.rows, 1),
            text.memory.data_ptr(),
            text.memory.shape[1],
            text.length,
            forbidden,
            *_addresses(angles, seen),
            text.rows,
            start,
            torch.get_num_threads(),
        )
        text.length += 1
        self._advance(start + 1)
        return chosen

    def logits(self, last: list[int]) -> Tensor:
        """[B, vocabulary] after the last tokens, one per row."""
        start, seen, angles = self._here()
        if self.native:
            logits = torch.empty((len(last), self._plan.vocabulary), dtype=self._plan.dtype)
            memory = self._forward.memory.of(self.cache, len(last), 1)
            described, threads = _addresses(angles, seen), torch.get_num_threads()
            self._plan.decoder.step(memory, last, logits.data_ptr(), *described, start, threads)
        else:
            hidden = self._forward.run(self._embed(torch.tensor(last)[:, None]), seen, angles, self.cache)
            logits = self._head(hidden)[:, -1]
        self._advance(start + 1)
        return logits

    def _here(self) -> tuple[int, Mask, Turned]:
        """Tokens in the cache, what the next one sees, and its angles."""
        start: int = self.cache.layers[0].length
        position, angles = self._position, self._forward.angles
        turned = angles.at(position, 1) if isinstance(position, int) else angles.of(position)
        return start, self._mask.of(start + 1), turned

    def _advance(self, length: int) -> None:
        self._position = self._position + 1
        for layer in self.cache.layers:
            layer.length = length


def _addresses(angles: Turned, seen: Mask) -> tuple[int, int, int, int, int]:
    """As the native calls take them; the caller holds what they point to."""
    return (*angles[:3], 0 if seen.seen is None else seen.seen.data_ptr(), seen.batch)


def _watched(module: Any) -> bool:
    """Whether calling the module does more than its class says."""
    return "forward" in module.__dict__ or bool(module._forward_hooks or module._forward_pre_hooks)
