"""How much memory a model needs, before any of it is allocated, and whether the machine has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from optimizations.contract import Optimization, Target
from optimizations.registry import spec_of, techniques
from pytest_inferencepio.catalog.configs import full_config, meta_model
from pytest_inferencepio.catalog.entries import ModelEntry
from pytest_inferencepio.catalog.tiny import tiny_config
from pytest_inferencepio.errors import NotEnoughMemory

# Fused experts are stacked and concatenated from a checkpoint's single ones: sources, stack and result at once.
MERGING_COPIES = 3
# Python with torch and transformers (0.5 GiB resident), a cache of 4,096 tokens and activations.
WORKING_MEMORY = 1 << 30
_CGROUP = Path("/sys/fs/cgroup")


def memory_need(
    entry: ModelEntry, scale: str, dtype: str = "bfloat16", optimizations: Sequence[Optimization] = ()
) -> int:
    """Bytes needed to load and run `entry`: final weights, the largest tensor on its way, working memory."""
    config = full_config(entry.name) if scale == "full" else tiny_config(entry.name)
    return config_need(entry, config, dtype, optimizations)


def config_need(
    entry: ModelEntry,
    config: Any,
    dtype: str,
    optimizations: Sequence[Optimization] = (),
    copies: int = 1,
) -> int:
    """`memory_need` of a configuration; only techniques that convert while loading reduce it.

    `copies` is how often the largest tensor exists on its way (`MERGING_COPIES` for mixtures from a checkpoint).
    """
    model = meta_model(entry, config, getattr(torch, dtype))
    largest = max(_bytes(parameter) for parameter in model.parameters())
    working = WORKING_MEMORY
    for part in optimizations:
        if part.converts_while_loading():
            ask = getattr(
                part, "working_bytes", None
            )  # what a technique needs beside the weights: ring buffers
            working += ask(model) if ask else 0
            part.convert_meta(model)
    return weight_bytes(model) + copies * largest + working


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once, without those that conversion will replace."""
    return sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in _kept(model)}.values())


def _kept(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        pending = getattr(module, "pending", ())
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and name not in pending:
                yield tensor


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def available_memory(device: str = "cpu") -> int:
    """Bytes a new process may take now: free device memory, or the host's, or the control group's if less."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    return available if limit is None or used is None else min(available, limit - used)


def _cgroup_number(name: str) -> int | None:
    path = _CGROUP / name
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None


def check_memory(
    entry: ModelEntry,
    config: Any,
    device: str,
    dtype: str,
    optimizations: Sequence[Optimization] = (),
    copies: int = 1,
    available: Callable[[str], int] = available_memory,
) -> None:
    """Compare the need with the machine.

    Raises:
        NotEnoughMemory: need, available, missing, and which optimization or scale would fit (computed).
    """
    need, have = config_need(entry, config, dtype, optimizations, copies), available(device)
    if need <= have:
        return
    raise NotEnoughMemory(
        f"{entry.name} with {spec_of(optimizations)} in {dtype} needs {_gib(need)} (weights, the largest tensor on its "
        f"way and {_gib(WORKING_MEMORY)} to work in); {_gib(have)} are available on {device}, {_gib(need - have)} are "
        f"missing. {what_fits(entry, config, device, dtype, have)}"
    )


def what_fits(entry: ModelEntry, config: Any, device: str, dtype: str, have: int) -> str:
    """A sentence: the techniques converting while loading that would fit into `have` bytes, else the scale."""
    needs = {
        part.spec(): config_need(entry, config, dtype, [part])
        for part in _candidates(Target(config, device, dtype))
    }
    fitting = {spec: need for spec, need in needs.items() if need <= have}
    if fitting:
        listed = ", ".join(
            f"{spec} ({_gib(need)})" for spec, need in sorted(fitting.items(), key=lambda x: x[1])
        )
        return f"What would fit: {listed}, with --pio-optimization."
    smallest = min(needs, key=lambda spec: needs[spec], default=None)
    tried = f" (the smallest, {smallest}, needs {_gib(needs[smallest])})" if smallest else ""
    tiny = config_need(entry, tiny_config(entry.name), dtype)
    return f"No optimization makes it fit{tried}; --pio-scale=tiny needs {_gib(tiny)}."


def _candidates(target: Target) -> list[Optimization]:
    offered = [technique for technique in techniques().values() if technique.converts_while_loading()]
    built = [technique() for technique in offered]
    return [part for part in built if part.refusal(target) is None]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
