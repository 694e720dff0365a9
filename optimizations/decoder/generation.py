"""What `generate()` does otherwise over a native decoder: the cache it makes, and the loop over tokens."""

from __future__ import annotations

import logging
from typing import Any

from transformers.cache_utils import DynamicCache

from optimizations.contract import Undo
from optimizations.decoder.cache import NativeCache
from optimizations.decoder.forward import NativeForward
from optimizations.decoder.stopping import Stopping
from optimizations.decoder.token_choice import TokenChoice
from optimizations.decoder.token_loop import generate_tokens, unsuitable

logger = logging.getLogger(__name__)

PREPARE = "_prepare_cache_for_generation"


def native_caches(model: Any, layers: int) -> Undo:
    """`generate` makes native caches where it would have made its default one; any other stays."""
    before = model.__dict__.get(PREPARE)
    original = getattr(model, PREPARE)

    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        brought = model_kwargs.get("past_key_values")
        original(generation_config, model_kwargs, *args, **kwargs)
        made: Any = model_kwargs.get("past_key_values")
        if brought is None and type(made) is DynamicCache and not made.offloading:
            model_kwargs["past_key_values"] = NativeCache(layers)

    model.__dict__[PREPARE] = prepare

    def undo() -> None:
        if before is None:
            del model.__dict__[PREPARE]
        else:
            model.__dict__[PREPARE] = before

    return undo


def native_loop(model: Any, forward: NativeForward) -> Undo:
    """Greedy and sampled decoding go through `token_loop`; whatever it does not know goes through transformers' loop.

    `generate` looks its loop up in the model's class, so the model gets a class of its own, of the same name.
    """
    cls = type(model)

    def _sample(
        self: Any,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        reason = "generation is synchronized" if synced_gpus else None
        reason = reason or unsuitable(self, forward, generation_config, model_kwargs)
        if reason is not None:
            logger.info("native_decoder leaves the loop over tokens to transformers: %s", reason)
            return cls._sample(
                self,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        choice = TokenChoice(logits_processor, generation_config.do_sample)
        stopping = Stopping(stopping_criteria, input_ids.shape[0])
        return generate_tokens(
            self, forward, input_ids, choice, stopping, generation_config, streamer, model_kwargs
        )

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made: Any = type(cls.__name__, (cls,), {**names, "_sample": _sample})
    model.__class__ = made

    def undo() -> None:
        model.__class__ = cls
        # A class lives in reference cycles until they are collected, and through this one caches and weights would.
        del made._sample

    return undo
