"""transformers' own seam for quantizing while loading: `from_pretrained(..., quantization_config=...)`.

    AutoModelForCausalLM.from_pretrained(directory, quantization_config=ConvertWhileLoading("weight_int4"))

Each tensor is read from the checkpoint, fused with its siblings where transformers does so (experts), packed, and
dropped before the next one is read: the unconverted model never exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimizations.contract import Target
from optimizations.errors import Refusal
from optimizations.registry import parse
from optimizations.weights.checkpoint_pages import CheckpointPages

METHOD = "pio"


@register_quantization_config(METHOD)
class ConvertWhileLoading(QuantizationConfigMixin):
    """Which techniques take their weights while a checkpoint is read, as a specification (`a(key=value)+b`).

    Raises:
        InvalidSpec, UnknownOptimization: the specification cannot be read.
        Refusal: a technique of it does not convert while loading.
    """

    def __init__(self, spec: str, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method
        self.spec = spec
        for part in self.techniques():
            if not part.converts_while_loading():
                raise Refusal(f"{part.name} cannot be applied while loading; load the model first")

    def techniques(self) -> list[Any]:
        """The configured techniques, in order of composition."""
        return list(parse(self.spec))


@register_quantizer(METHOD)
class TensorByTensor(HfQuantizer):
    """Puts modules that convert into the meta model and hands them every tensor as it is read."""

    quantization_config: ConvertWhileLoading

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        dtype = str(kwargs.get("dtype") or model.dtype).removeprefix("torch.")
        for part in self.quantization_config.techniques():
            reason = part.refusal(Target(model.config, "cpu", dtype))
            if reason:
                raise Refusal(f"{part.name} refuses {model.config.model_type}: {reason}")
            part.convert_meta(model)
        self._pages: CheckpointPages | None = None
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._pages is not None:
            self._pages.own([*model.parameters(), *model.buffers()])
        return model

    @property
    def pages(self) -> CheckpointPages:
        """The checkpoint's mappings, looked up when the first tensor arrives: then all files are open."""
        if self._pages is None:
            self._pages = CheckpointPages()
        return self._pages

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        owner, name = _owner(model, param_name)
        return name in getattr(owner, "pending", ())

    def get_quantize_ops(self) -> ConversionOps:
        return HandOver(self)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class HandOver(ConversionOps):
    """Gives a tensor to the module that replaced its owner; nothing is left for transformers to set."""

    def __init__(self, quantizer: TensorByTensor) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]  # the base class names more arguments than operations use
        self,
        input_dict: dict[str, Any],
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        for full_name in list(input_dict):
            value = input_dict.pop(full_name)
            owner, name = _owner(model, full_name)
            owner.load_weight(name, value[0] if isinstance(value, list) else value)
        self.quantizer.pages.release()
        if missing_keys is not None:
            missing_keys -= _given(model, missing_keys)
        return {}


def _owner(model: nn.Module, full_name: str) -> tuple[Any, str]:
    path, _, name = full_name.rpartition(".")
    return model.get_submodule(path), name


def _given(model: nn.Module, keys: set[str]) -> set[str]:
    """Those of `keys` that stand for tensors which exist by now: packed parts, and names no longer waited for."""
    return {key for key in keys if _is_given(*_owner(model, key))}


def _is_given(owner: Any, name: str) -> bool:
    if not hasattr(owner, "load_weight"):
        return False
    tensor = owner._parameters.get(name, owner._buffers.get(name))
    return tensor is None or not tensor.is_meta
