"""One decode step of one decoder layer, compiled once and shared by all layers of its structure."""

from __future__ import annotations

import dataclasses
import itertools
import time
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from optimizations.compute.preallocated_cache import PreallocatedLayer, StepCache, preallocated_cache

_numbers = itertools.count()
# Steps outlive an undo with their model, so that applying again costs no second compilation.
_steps: weakref.WeakKeyDictionary[nn.Module, dict[Any, CompiledStep]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass
class CompileReport:
    """`compilations` counts compiled graphs, `warmed_up` those compiled before `apply` returned; `seconds` is the
    time inside TorchInductor, tracing not included."""

    compilations: int = 0
    warmed_up: int = 0
    seconds: float = 0.0


def decode_step(
    forward: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    settings: dict[str, Any],
) -> torch.Tensor:
    """A layer's forward for one token as a function of tensors; what `CompiledStep` hands to the compiler."""
    return forward(
        hidden_states,
        attention_mask=attention_mask,
        past_key_values=StepCache(keys, values),
        position_embeddings=(cos, sin),
        **settings,
    )


class CompiledStep:
    """`decode_step` under `torch.compile`, with a count of what was compiled.

    Each gets a code object of its own: the compiler stores its results, and limits their number, per code.
    """

    def __init__(self, mode: str, report: CompileReport) -> None:
        self.options = torch._inductor.list_mode_options(mode)
        self.report = report
        code = decode_step.__code__.replace(co_name=f"decode_step_{next(_numbers)}")
        function = types.FunctionType(code, decode_step.__globals__)
        self.call = torch.compile(function, backend=self.backend, fullgraph=True)

    def backend(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own uses of torch.jit
            from torch._inductor.compile_fx import compile_fx  # takes a second to import

            compiled: Any = compile_fx(graph, example_inputs, config_patches=self.options)
        self.report.compilations += 1
        self.report.seconds += time.perf_counter() - start
        return compiled


class CompiledLayer:
    """`forward` of one decoder layer: decode steps on a preallocated cache compiled, everything else as before."""

    def __init__(self, index: int, layer: nn.Module, step: CompiledStep, boolean_mask: bool) -> None:
        self.index = index
        self.layer = layer
        self.step = step
        self.boolean_mask = boolean_mask
        self.original = layer.forward
        self.numbered = [part.__dict__ for part in layer.modules() if "layer_idx" in part.__dict__]
        self.numbers = [attributes["layer_idx"] for attributes in self.numbered]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        cache = self._decodes(hidden_states, past_key_values, position_embeddings)
        if cache is None or position_embeddings is None:
            return self.original(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **settings,
            )
        settings.pop("position_ids", None)  # rotation is done by then; its shape varies with the caller
        cache.reserve(1)
        tensors = self._inputs(hidden_states, attention_mask, position_embeddings, cache)
        output: torch.Tensor = self._call(tensors, settings)
        cache.length += 1
        return output

    def _decodes(self, hidden_states: torch.Tensor, cache: Any, positions: Any) -> PreallocatedLayer | None:
        """This layer's cache when the step can run compiled."""
        if hidden_states.shape[1] != 1 or cache is None or positions is None or torch.is_grad_enabled():
            return None
        own = cache.layers[self.index] if self.index < len(cache.layers) else None
        return own if isinstance(own, PreallocatedLayer) and own.length else None

    def _inputs(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        positions: tuple[torch.Tensor, torch.Tensor],
        cache: PreallocatedLayer,
    ) -> tuple[torch.Tensor | None, ...]:
        """Inputs in one of two forms: a single row, or a batch of any size with a mask; any cache length."""
        rows = hidden_states.shape[0]
        keys, values = cache.filled(1)
        cos, sin = (
            each if len(each) == rows else each.expand(rows, -1, -1).contiguous() for each in positions
        )
        if rows > 1 and mask is None and self.boolean_mask:
            mask = keys.new_ones(rows, 1, 1, keys.shape[2], dtype=torch.bool)
        for tensor in (keys, values):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)
        if mask is not None:
            torch._dynamo.maybe_mark_dynamic(mask, 3)
        tensors = (hidden_states, mask, cos, sin, keys, values)
        if rows > 1:
            for each in tensors:
                if each is not None:
                    torch._dynamo.maybe_mark_dynamic(each, 0)
        return tensors

    def _call(self, tensors: tuple[torch.Tensor | None, ...], settings: dict[str, Any]) -> torch.Tensor:
        """Run compiled while every layer calls itself number 0: its number would be compiled in."""
        for attributes in self.numbered:
            attributes["layer_idx"] = 0
        try:
            return self.step.call(self.original, *tensors, settings)
        finally:
            for attributes, number in zip(self.numbered, self.numbers, strict=True):
                attributes["layer_idx"] = number


class CompiledDecode:
    """Compiled decode steps of a whole model; `install` puts them in place, `remove` takes them out exactly."""

    def __init__(self, model: Any, layers: nn.ModuleList, mode: str) -> None:
        self.model = model
        self.layers = layers
        self.report = CompileReport()
        known = _steps.setdefault(model, {})
        boolean_mask = model.config.get_text_config(decoder=True)._attn_implementation == "sdpa"
        self.compiled = []
        for index, layer in enumerate(layers):
            key = (mode, _structure(layer))
            step = known.setdefault(key, CompiledStep(mode, self.report))
            step.report = self.report
            self.compiled.append(CompiledLayer(index, layer, step, boolean_mask))
        self._forwards = [layer.__dict__.get("forward") for layer in layers]
        self._prepare = model.__dict__.get("_prepare_cache_for_generation")
        self._prepare_before = model._prepare_cache_for_generation

    def install(self) -> None:
        for layer, compiled in zip(self.layers, self.compiled, strict=True):
            layer.forward = compiled.forward  # type: ignore[method-assign]
        self.model._prepare_cache_for_generation = self.prepare_cache

    def remove(self) -> None:
        for layer, forward in zip(self.layers, self._forwards, strict=True):
            _restore(layer, "forward", forward)
        _restore(self.model, "_prepare_cache_for_generation", self._prepare)

    def prepare_cache(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """generate() asks for a cache: a preallocated one, unless the caller brought or named another."""
        named = generation_config.cache_implementation is not None or generation_config.use_cache is False
        if named or model_kwargs.get("past_key_values") is not None or "assisted" in generation_mode.value:
            self._prepare_before(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        generation_config.disable_compile = True  # of the whole model, on top of its compiled layers
        model_kwargs["past_key_values"] = preallocated_cache(len(self.layers), max_cache_length)


def _structure(layer: nn.Module) -> tuple[Any, ...]:
    """What must be equal for two layers to share compiled code: module types, shapes, dtypes."""
    modules = tuple((name, type(part)) for name, part in layer.named_modules())
    tensors = itertools.chain(layer.named_parameters(), layer.named_buffers())
    return modules, tuple((name, tuple(each.shape), each.dtype) for name, each in tensors)


def _restore(owner: Any, name: str, value: Any) -> None:
    """Give `owner` back the instance attribute it had, or none."""
    if value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
