"""Finding the decoder layers of a transformers model: what is compiled once, streamed one by one."""

from __future__ import annotations

from typing import Any

from torch import nn


def decoder_layers(model: Any) -> nn.ModuleList:
    """The stack of decoder layers of a causal language model, also inside a vision-language model.

    Raises:
        TypeError: the model has no module list called `layers` in its decoder.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise TypeError(f"{type(model).__name__} has no list of decoder layers at get_decoder().layers")
    return layers
