"""What `--pio-list` prints: everything a user can ask for on this machine."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from pytest_inferencepio import extensions, guards, options
from pytest_inferencepio.catalog.entries import SCALES
from pytest_inferencepio.models import Model
from pytest_inferencepio.naming import CATEGORIES, EXTRA_CATEGORIES
from pytest_inferencepio.options import Settings
from pytest_inferencepio.selection import refusal

WIDTH = 100
CATEGORY_TEXTS = {
    "accuracy": "logits, generations, perplexity, tasks, stability, gradients against the unoptimized model",
    "inference_speed": "time to first token, time per output token, prefill and decode rates, worst case",
    "memory_usage": "peak memory of a fresh process, weights, KV bytes per token, achieved read bandwidth",
    "throughput": "tokens and requests per second over batch sizes and Poisson arrivals, goodput",
    "power_efficiency": "joules per token by NVML or RAPL, or the reason why there are none",
    "optimization_impact": "before and after, paired: speed, memory, accuracy, conversion time, targets",
    "hardware": "bandwidth and arithmetic of this machine, how near prefill and decode come (only when named)",
    "comparative": "other engines and kernels on the same dimensions, interleaved (only with --pio-peer or named)",
}
SCALE_TEXTS = {
    "tiny": "the same architecture, a few million trained parameters, shipped with the package",
    "full": "the published dimensions: a checkpoint (--pio-checkpoint) or random weights",
}


def of(config: pytest.Config) -> str:
    """The listing of this configuration, models and optimizations of conftests included.

    Raises:
        pytest.UsageError: an option that cannot be read, another package named `optimizations`.
    """
    guards.check_optimizations()
    settings = options.read(config)
    guards.check_device(settings)
    models = extensions.collect(config).models
    from pytest_inferencepio import machine

    return listing(models, settings, machine.fingerprint(settings.device).to_mapping())


def listing(models: Sequence[Model], settings: Settings, fingerprint: Mapping[str, Any]) -> str:
    """The whole text; imports the techniques, loads no weight."""
    sections = (
        ("models", _models(models)),
        (f"optimizations (on {settings.device}, {settings.dtype})", _optimizations(models, settings)),
        ("categories", _pairs((name, CATEGORY_TEXTS[name]) for name in CATEGORIES + EXTRA_CATEGORIES)),
        ("peers (--pio-peer)", _peers(models, settings)),
        ("scales", _pairs((name, SCALE_TEXTS[name]) for name in SCALES)),
        ("this machine", _pairs(_fingerprint_rows(fingerprint))),
    )
    return "\n\n".join(f"{title}\n" + "\n".join(lines) for title, lines in sections)


def _models(models: Sequence[Model]) -> Iterator[str]:
    width = max(len(model.name) for model in models)
    for model in models:
        entry = model.entry
        published = "" if entry.published_as == model.name else entry.published_as
        size = f"{entry.parameters / 1e9:.2f} B parameters" if entry.parameters else ""
        scales = f"scales: {', '.join(model.scales)}"
        facts = "; ".join(text for text in (published, entry.special, size, scales) if text)
        yield from _row(model.name, facts, width)
        if entry.aliases:
            yield from _row("", f"also called {', '.join(entry.aliases)}", width)


def _optimizations(models: Sequence[Model], settings: Settings) -> Iterator[str]:
    """Each technique's kind, summary, fidelity, source and the models it refuses, by scale where that differs."""
    from optimizations.registry import techniques

    known = techniques()
    width = max((len(name) for name in known), default=4)
    yield from _row("none", "the unoptimized model, what all others are compared with", width)
    for name, technique in known.items():
        yield from _row(name, f"[{technique.kind.value}] {technique.summary}", width)
        yield from _row("", f"fidelity: {technique.fidelity.value}; source: {technique.source}", width)
        part = technique.from_settings({})
        for model in models:
            reasons = {
                scale: refusal(model, scale, (part,), settings.device, settings.dtype)
                for scale in model.scales
            }
            for text in _refusals(model.name, name, reasons):
                yield from _row("", text, width)


def _peers(models: Sequence[Model], settings: Settings) -> Iterator[str]:
    """Each peer's summary, source, version or what to install, and the models it cannot run."""
    from optimizations.contract import Target
    from pytest_inferencepio.peers.registry import peers

    known = peers()
    width = max((len(name) for name in known), default=4)
    for name, peer in known.items():
        yield from _row(name, peer.summary, width)
        yield from _row("", f"source: {peer.source}", width)
        absent = peer.missing()
        yield from _row("", absent or peer.version(), width)
        for model in models if absent is None else ():
            reasons = {
                scale: peer.refusal(Target(model.config(scale), settings.device, settings.dtype))
                for scale in model.scales
            }
            for text in _refusals(model.name, name, reasons):
                yield from _row("", text, width)


def _refusals(model: str, technique: str, reasons: Mapping[str, str | None]) -> list[str]:
    """One sentence if every scale is refused for one reason, else one for each refused scale."""
    prefix = f"{technique} refuses {model}: "
    if len(set(reasons.values())) == 1:
        reason = next(iter(reasons.values()))
        return [f"refuses {model}: {reason.removeprefix(prefix)}"] if reason else []
    return [f"refuses {model} at {scale}: {r.removeprefix(prefix)}" for scale, r in reasons.items() if r]


def _fingerprint_rows(fingerprint: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Nested figures one per row, rates in giga-units."""
    for name, value in fingerprint.items():
        if name == "machine_class":  # made of the rows above
            continue
        if not isinstance(value, Mapping):
            yield name, _plain(name, value)
            continue
        for key, inner in value.items():
            yield f"{name} {_size(key)}", _rate(name, inner) if isinstance(inner, Mapping) else str(inner)


def _plain(name: str, value: Any) -> str:
    if name == "memory" and isinstance(value, (int, float)):
        return f"{value / 2**30:.1f} GiB"
    return "unknown" if value is None else str(value)


def _size(key: str) -> str:
    """Working sets in bytes, given as decimal texts, in MiB."""
    return f"{int(key) / 2**20:g} MiB" if str(key).isdigit() else str(key)


def _rate(name: str, rate: Mapping[str, Any]) -> str:
    unit = {"read_bandwidth": "GB/s", "arithmetic": "GOP/s"}.get(name, "G/s")
    return f"{float(rate['value']) / 1e9:.3g} {unit}"


def _pairs(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        yield from _row(name, text, width)


def _row(name: str, text: str, width: int) -> list[str]:
    """`  name  text`, the text wrapped under itself."""
    indent = " " * (width + 4)
    lines = textwrap.wrap(text, max(40, WIDTH - len(indent))) or [""]
    return [f"  {name:<{width}}  {lines[0]}", *(indent + line for line in lines[1:])]
