"""Decoder layers read from disk while the model runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from optimizations.compute.decoder_layers import decoder_layers
from optimizations.contract import BITWISE_BUDGET, AccuracyBudget, Fidelity, Kind, Optimization, Target, Undo
from optimizations.errors import InvalidSpec, Refusal
from optimizations.storage.disk_sink import DiskSink
from optimizations.storage.layer_ring import StreamingReport
from optimizations.storage.streamed_layers import StreamedLayers, layer_tensors, write_layers

if TYPE_CHECKING:
    from optimizations.runner import Runner

ATTACHED = "streamed_layers"  # attribute of the model while the technique is in force
SINK = "streaming_sink"  # attribute of a model that is being loaded to disk


@dataclasses.dataclass(frozen=True)
class LayerStreaming(Optimization):
    """Keeps decoder layers on disk and reads each one just before it runs, so a model larger than memory runs.

    The weights (all parameters and buffers of a layer, packed ones too) are written once to a file of aligned,
    checksummed records. A thread reads them past the page cache (O_DIRECT; without it a model that fits would
    only seem to stream) into `buffers` ring buffers in the order of execution, wrapping around to the next
    forward, while layers compute; a layer's tensors are views of its buffer. Embeddings, final norm, output head,
    vision tower and the first `pin_layers` layers stay in memory. Source: FlexGen (Sheng et al., ICML 2023); LLM in
    a flash (Alizadeh et al., arXiv 2312.11514).

    It is never a speed-up: a token costs at least bytes_per_pass / disk bandwidth, which batches and prefill share.
    Logits are identical bit for bit. `streaming_report` gives bytes per pass, the bandwidth reached and the time
    that compute waited. `directory` is where the file goes (default: the directory for temporary files); it has no name
    there, so nothing is left of it however the process ends.
    """

    name: ClassVar[str] = "layer_streaming"
    kind: ClassVar[Kind] = Kind.STORAGE
    fidelity: ClassVar[Fidelity] = Fidelity.BITWISE
    summary: ClassVar[str] = (
        "decoder layers on disk, prefetched past the page cache: models larger than memory"
    )
    source: ClassVar[str] = "FlexGen (Sheng et al., ICML 2023); LLM in a flash (arXiv 2312.11514)"
    budget: ClassVar[AccuracyBudget] = BITWISE_BUDGET
    conflicts: ClassVar[Mapping[str, str]] = {}

    directory: str = ""
    buffers: int = 3
    pin_layers: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.directory, str):
            raise InvalidSpec(f"{self.name}: directory must be a path, got {self.directory!r}")
        for setting, least, why in (
            ("buffers", 2, "one computes, one is being filled"),
            ("pin_layers", 0, "layers that stay in memory"),
        ):
            value = getattr(self, setting)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidSpec(
                    f"{self.name}: {setting} must be a whole number of at least {least} ({why}), got {value!r}"
                )

    def refusal(self, target: Target) -> str | None:
        if target.device != "cpu":
            return f"it streams from disk into host memory; the model is on {target.device}"
        count = getattr(target.config.get_text_config(decoder=True), "num_hidden_layers", 0)
        if self.pin_layers >= count:
            return (
                f"pin_layers={self.pin_layers} keeps all {count} layers in memory; nothing would be streamed"
            )
        return None

    def convert_meta(self, model: nn.Module) -> None:
        """Let the layers' weights go to disk while loading; `apply` then only starts the streaming.

        Layers that another technique converts while loading are packed in memory first, and `apply` moves them.
        """
        if hasattr(model, SINK):
            raise Refusal(f"{self.name} already takes this model's weights")
        layers = self._streamed(model)
        if not any(hasattr(module, "load_weight") for layer in layers for module in layer.modules()):
            setattr(model, SINK, DiskSink(layers, self.directory))

    def working_bytes(self, model: nn.Module) -> int:
        """Bytes of the ring buffers for `model`, asked before it is converted (its tensors may be on the meta device)."""
        return self.buffers * max(_layer_bytes(layer) for layer in self._streamed(model))

    def apply(self, runner: Runner) -> Undo:
        model: Any = runner.model
        if hasattr(model, ATTACHED):  # loaded to disk and started before
            return _nothing
        sink = model.__dict__.pop(SINK, None)
        layers = self._streamed(model)
        if sink is None:
            tensors = layer_tensors(model, layers)
            file = write_layers(self.directory, tensors)
        else:
            tensors, file = sink.finish()
        streamed = StreamedLayers(model, layers, tensors, file, self.buffers)
        streamed.report.pinned_layers = self.pin_layers
        streamed.install()
        setattr(model, ATTACHED, streamed)

        def undo() -> None:
            delattr(model, ATTACHED)
            streamed.remove()

        return undo if sink is None else _nothing  # what was loaded to disk need not fit into memory

    def _streamed(self, model: Any) -> list[nn.Module]:
        return list(decoder_layers(model))[self.pin_layers :]

    def remarks(self, runner: Runner) -> Sequence[str]:
        report = streaming_report(runner)
        way = "past the page cache" if report.direct else report.note
        read = f"{report.bytes_per_pass / 1e6:.4g} MB per pass from disk at {report.bandwidth / 1e9:.3g} GB/s ({way})"
        return (f"{read}; compute waited {report.stall_seconds:.3g} s in {report.passes} passes",)

    @classmethod
    def search_space(cls) -> dict[str, Sequence[Any]]:
        return {"buffers": (2, 3, 4), "pin_layers": (0, 2, 4)}


def _layer_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's tensors without those that a packed form will replace."""
    return sum(
        tensor.numel() * tensor.element_size()
        for module in layer.modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None and name not in getattr(module, "pending", ())
    )


def _nothing() -> None:
    """Undo of a conversion that happened while loading."""


def streaming_report(runner: Runner) -> StreamingReport:
    """What streaming did so far; LookupError when `layer_streaming` is not in force."""
    streamed = getattr(runner.model, ATTACHED, None)
    if streamed is None:
        raise LookupError("layer_streaming is not applied to this model, so nothing counts its reads")
    report: StreamingReport = streamed.report
    return report
