"""The patch embedding of a vision tower as the matrix product that it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from optimizations.contract import Undo

PATCH_EMBEDS = ("Qwen3VLVisionPatchEmbed",)


def embed_patches(module: Any, pixels: Tensor) -> Tensor:
    """`module(pixels)` by one product: pixels [patches, channels * frames * side * side] -> [patches, hidden].

    Each patch is a whole input of the convolution and as large as its kernel, so it is a product of rows. oneDNN's
    convolution takes 0.65 to 0.78 s for the 784 patches of a 448-pixel image (Qwen3-VL-2B, two cores with AMX), the
    product 6 ms. Sums are in another order.
    """
    kernel = module.proj
    weight = kernel.weight.reshape(kernel.out_channels, -1)
    return functional.linear(pixels.reshape(-1, weight.shape[1]).to(weight.dtype), weight, kernel.bias)


def multiply_patches(model: nn.Module) -> Undo:
    """Every patch embedding of `model` that nobody else replaced computes by `embed_patches`; returns the undo."""
    changed = [
        module
        for module in model.modules()
        if type(module).__name__ in PATCH_EMBEDS and "forward" not in module.__dict__
    ]
    for module in changed:
        module.__dict__["forward"] = _bound(module)

    def undo() -> None:
        while changed:
            del changed.pop().__dict__["forward"]

    return undo


def _bound(module: Any) -> Any:
    return lambda hidden_states: embed_patches(module, hidden_states)
