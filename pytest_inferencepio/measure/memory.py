"""Memory: peak of a fresh process, bytes that are really held and read, bytes per token of the real cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_inferencepio import workloads
from pytest_inferencepio.errors import NotMeasurable
from pytest_inferencepio.machine import Work
from pytest_inferencepio.measure.latency import Generation
from pytest_inferencepio.measure.metrics import from_estimate
from pytest_inferencepio.measure.processes import FreshProcesses
from pytest_inferencepio.record import Metric, metric, not_measured
from pytest_inferencepio.stats import median_estimate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimizations.runner import Runner

GENERATION = "pytest_inferencepio.measure.fresh:generation"
WITHOUT_MODEL = "pytest_inferencepio.measure.fresh:without_model"
PATIENCE = 4.0  # s; a process with a tiny model takes half a second, one that compiles it up to half a minute


def peak_metrics(
    processes: FreshProcesses,
    arguments: Mapping[str, Any],
    n: int = 1,
    timeout: float = 1800.0,
    patience: float = PATIENCE,
) -> dict[str, Metric]:
    """Peak of at most `n` fresh processes that each load, optimize and generate (`fresh.generation`'s arguments).

    `peak_memory` is the whole process, `model_peak_memory` what it exceeds a process without a model by; the
    interval is the range of the processes. No further one is started after `patience` seconds. The process without a
    model is the same for every row and measured once.
    """
    empty = processes.run_once(WITHOUT_MODEL, timeout).peak
    start, reports = time.monotonic(), [processes.run(GENERATION, arguments, timeout)]
    while len(reports) < n and time.monotonic() - start < patience:
        reports.append(processes.run(GENERATION, arguments, timeout))
    peaks = [float(report.peak) for report in reports]
    allocator = [report.result["allocator_peak"] for report in reports]
    found = {
        "peak_memory": from_estimate("peak_memory", median_estimate(peaks), peaks),
        "model_peak_memory": from_estimate(
            "model_peak_memory", median_estimate([max(peak - empty, 0.0) for peak in peaks])
        ),
        "process_memory": metric("process_memory", empty),
    }
    if None in allocator:
        reason = "torch's CPU allocator keeps no high-water mark; peak_memory is the whole process"
        return {**found, "allocator_peak": not_measured("allocator_peak", reason)}
    return {**found, "allocator_peak": from_estimate("allocator_peak", median_estimate(allocator))}


def memory_ratios(before: Mapping[str, Metric], after: Mapping[str, Metric]) -> dict[str, Metric]:
    """after / before of the whole process' peak, of the model's part of it, and of the weights."""
    names = {
        "memory_ratio": "peak_memory",
        "model_memory_ratio": "model_peak_memory",
        "weight_memory_ratio": "weight_memory",
    }
    return {ratio: _ratio(ratio, before.get(name), after.get(name)) for ratio, name in names.items()}


def _ratio(name: str, before: Metric | None, after: Metric | None) -> Metric:
    if before is None or after is None or not before.value or after.value is None:
        return not_measured(name, "one of the two sides was not measured")
    return metric(name, after.value / before.value, n=min(before.n, after.n))


# Of the last prompt, not of the model: Qwen3-VL keeps its positions there, and only a model that has run has them.
_PROMPT_STATE = frozenset({"rope_deltas"})


def held_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers and tensors in plain attributes (packed weights, rings), with their full names.

    Names repeat for tied tensors.
    """
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, value in [*part._parameters.items(), *part._buffers.items(), *vars(part).items()]:
            if name in _PROMPT_STATE:
                continue
            for tensor in _tensors(value):
                yield f"{prefix}.{name}", tensor


def weight_memory(model: nn.Module) -> int:
    """Bytes of memory behind every tensor the model holds, each storage once (ties, views)."""
    return sum(_storages(tensor for _, tensor in held_tensors(model)).values())


def cache_tensors(cache: Any) -> Iterator[torch.Tensor]:
    """Every tensor reachable from a cache object through attributes, lists, tuples and mappings."""
    yield from _reachable(cache, set())


def kv_bytes_per_token(runner: Runner, short: int = 64, long: int = 192, seed: int = 0) -> Metric:
    """Bytes the real cache grows by per token: its tensors after a `short` and a `long` prompt, in `generate`.

    A cache allocated at once (static) does not grow with the prompt: then its size over its capacity.
    """
    try:
        sizes = [_cache_bytes(runner, length, seed) for length in (short, long)]
    except NotMeasurable as error:
        return not_measured("kv_bytes_per_token", str(error))
    if sizes[1] > sizes[0]:
        return metric("kv_bytes_per_token", (sizes[1] - sizes[0]) / (long - short), n=2)
    return metric("kv_bytes_per_token", sizes[1] / (long + 1), n=1)


def bytes_read_per_step(runner: Runner) -> float:
    """Bytes of weights one decoding step must read, for one sequence.

    All tensors of the text model once; of routed experts the share a token is routed to; of the input
    embedding one row, unless the output layer reads it all (tied). The vision tower is not read, nor what a technique
    says that it keeps for other passes; what is streamed from disk counts with the buffer it passes through.
    """
    model = runner.model
    share = routed_share(runner)
    skipped = _embedding_only(model) | _unread(runner)
    storages: dict[int, float] = {}
    for name, tensor in held_tensors(model):
        key = tensor.untyped_storage().data_ptr()
        if key in skipped or tensor.is_meta or _is_vision(name):
            continue
        fraction = share if _is_routed(name) else 1.0
        storages[key] = max(storages.get(key, 0.0), fraction * tensor.untyped_storage().nbytes())
    return sum(storages.values())


def flops_per_token(model: PreTrainedModel, share: float) -> float:
    """Operations of the weight matrices one token of a prompt passes, without the output layer: a lower bound."""
    output = model.get_output_embeddings()
    skip = {id(parameter) for parameter in (*model.get_input_embeddings().parameters(), *output.parameters())}
    return sum(
        2.0 * parameter.numel() * (share if _is_routed(name) else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and id(parameter) not in skip and not _is_vision(name)
    )


def work_of(before: Runner, after: Runner, tokens_per_step: float = 1.0) -> Work:
    """Least work per step of `after`; operations are counted on `before`, whose weights are not packed."""
    return Work(
        bytes_read_per_step(after), flops_per_token(before.model, routed_share(before)), tokens_per_step
    )


def bandwidth_metrics(runner: Runner, generations: list[Generation]) -> dict[str, Metric]:
    """`bytes_read_per_token` and the `memory_bandwidth` that decoding achieves: those bytes per token time."""
    needed = bytes_read_per_step(runner)
    per_token = median_estimate([g.time_per_output_token for g in generations])
    return {
        "bytes_read_per_token": metric("bytes_read_per_token", needed),
        "memory_bandwidth": from_estimate("memory_bandwidth", per_token.inverted(needed)),
    }


def routed_share(runner: Runner) -> float:
    """Experts a token uses over routed experts there are; 1 for dense models."""
    config = runner.text_config
    total = getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None)
    return config.num_experts_per_tok / total if total else 1.0


def _cache_bytes(runner: Runner, length: int, seed: int) -> int:
    output = runner.generate(
        **workloads.prompt(runner, length, seed),
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
    )
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise NotMeasurable(f"generate() of {type(runner.model).__name__} returned no cache to look into")
    return sum(_storages(cache_tensors(cache)).values())


def _storages(tensors: Iterator[torch.Tensor]) -> dict[int, int]:
    found = (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in a value or directly inside its containers; modules are visited by `named_modules`."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _reachable(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen or isinstance(value, nn.Module | type):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _reachable(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _reachable(item, seen)
    elif type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
        yield from _reachable(vars(value), seen)


def _embedding_only(model: PreTrainedModel) -> set[int]:
    """Storages of the input embedding, packed or not, that the output layer does not share."""
    read = set(_storages(tensor for _, tensor in held_tensors(model.get_output_embeddings())))
    return set(_storages(tensor for _, tensor in held_tensors(model.get_input_embeddings()))) - read


def _unread(runner: Runner) -> set[int]:
    """Storages that techniques keep for other passes than decoding; whoever else holds them reads them no more."""
    names = {name for part in runner.applied for name in part.unread(runner)}
    return set(_storages(tensor for name, tensor in held_tensors(runner.model) if name in names))


def _is_routed(name: str) -> bool:
    return ".experts." in name


def _is_vision(name: str) -> bool:
    return ".visual." in f".{name}"
