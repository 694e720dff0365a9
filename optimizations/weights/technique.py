"""What the weight quantizations share: which modules are replaced, in place or while loading, and the undo."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimizations.contract import Optimization, Target, Undo
from optimizations.errors import Refusal
from optimizations.weights.formats import WeightFormat
from optimizations.weights.kept import (
    Kept,
    is_fused_experts,
    kept_weights,
    packed_modules,
    why_not_experts,
    why_not_linear,
)
from optimizations.weights.packed_modules import PackedEmbedding, PackedExperts, PackedLinear, PackedModule
from optimizations.weights.spill import SetAside

if TYPE_CHECKING:
    from optimizations.runner import Runner

_ROUTER = "a router: below 0.1 % of the weights, and its top-k decides which experts run"
_LOOKUP = "a lookup table: one row is read per token, so packing it saves memory and no time"


@dataclasses.dataclass(frozen=True)
class Site:
    """A module to be replaced: where it hangs and what takes its place."""

    name: str
    parent: nn.Module
    attribute: str
    original: nn.Module
    packed: PackedModule


@dataclasses.dataclass(frozen=True)
class WeightQuantization(Optimization):
    """Linear layers, the output head and fused experts over packed weights."""

    @abstractmethod
    def weight_format(self) -> WeightFormat:
        """How the matrices are stored."""

    @property
    @abstractmethod
    def packs_head(self) -> bool:
        """Whether the output head (and an embedding tied to it) is packed."""

    @property
    @abstractmethod
    def packs_embedding(self) -> bool:
        """Whether an embedding that is not tied to the head is packed."""

    def refusal(self, target: Target) -> str | None:
        if target.device.partition(":")[0] != "cpu":
            return (
                f"its kernels run on CPUs and the model is on {target.device}; load it with --pio-device=cpu"
            )
        if target.dtype not in ("bfloat16", "float32"):
            return f"it takes activations in bfloat16 or float32, not {target.dtype}"
        return None

    def convert_meta(self, model: nn.Module) -> None:
        for site in self._sites(model):
            for name, parameter in site.original._parameters.items():
                if parameter is not None and name != "bias":
                    site.packed.expect(name, parameter)
            site.parent._modules[site.attribute] = site.packed
        _untie(model)

    @torch.no_grad()
    def apply(self, runner: Runner) -> Undo:
        model = runner.model
        if self._already(model):
            return _nothing
        aside, replaced, restore_ties = SetAside(), list[Site](), _untie_later(model)

        def undo() -> None:
            for site in replaced:
                site.parent._modules[site.attribute] = site.original
            aside.restore()
            restore_ties()

        try:
            for site in self._sites(model):
                self._replace(site, aside)
                replaced.append(site)
            _untie(model)
        except BaseException:
            undo()
            raise
        return undo

    def kept(self, model: nn.Module) -> list[Kept]:
        """The matrices of a converted model that stay as they were, each with its reason."""
        return kept_weights(model, self._reason)

    def _already(self, model: nn.Module) -> bool:
        """Whether `model` was converted by this very technique while loading.

        Raises:
            Refusal: it holds weights packed in another format.
        """
        formats = {module.format for _, module in packed_modules(model)}
        if not formats:
            return False
        if formats != {self.weight_format()}:
            found = ", ".join(sorted(map(str, formats)))
            raise Refusal(f"{self.name} needs dense weights; the model's are packed already, as {found}")
        return True

    def _replace(self, site: Site, aside: SetAside) -> None:
        kept = site.packed._parameters.values()
        parameters = {
            name: parameter
            for name, parameter in site.original._parameters.items()
            if parameter is not None and not any(parameter is other for other in kept)
        }
        filled = {name: parameter for name, parameter in parameters.items() if parameter.numel()}
        for name, parameter in filled.items():  # a tied one is empty by its second turn
            try:
                site.packed.load_weight(name, parameter.detach())
            except Refusal as reason:
                raise Refusal(f"{self.name}: {site.name}: {reason}") from reason
            aside.store(parameter)
        site.parent._modules[site.attribute] = site.packed

    def _sites(self, model: Any) -> Iterator[Site]:
        """Every module to replace. The list is made before the first replacement."""
        fmt = self.weight_format()
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = _tied(model, head, embedding)
        sites, packed_head = [], None
        for name, parent, attribute, module in _children(model):
            if isinstance(module, nn.Linear) and why_not_linear(module, fmt) is None:
                if module is head and not self.packs_head:
                    continue
                packed = PackedLinear.like(module, fmt)
                packed_head = packed if module is head else packed_head
                sites.append(Site(name, parent, attribute, module, packed))
            elif is_fused_experts(module) and why_not_experts(module, fmt) is None:
                sites.append(Site(name, parent, attribute, module, PackedExperts.like(module, fmt)))
        table = packed_head if tied else self._table(embedding, fmt)
        for name, parent, attribute, module in _children(model):
            if module is embedding and table is not None and type(module) is nn.Embedding:
                packed_embedding = PackedEmbedding(table, module.padding_idx)
                sites.append(Site(name, parent, attribute, module, packed_embedding))
        return iter(sites)

    def _table(self, embedding: Any, fmt: WeightFormat) -> PackedLinear | None:
        if not self.packs_embedding or type(embedding) is not nn.Embedding:
            return None
        rows, cols = embedding.weight.shape
        return None if fmt.unfit(rows, cols) else PackedLinear(cols, rows, None, fmt, embedding.weight.dtype)

    def _reason(self, name: str, module: nn.Module) -> str:
        fmt = self.weight_format()
        if isinstance(module, PackedLinear) and module.kept_because is not None:
            return module.kept_because
        if isinstance(module, nn.Linear):
            return why_not_linear(module, fmt) or "the output head: include_lm_head is off"
        if is_fused_experts(module):
            return why_not_experts(module, fmt) or "experts added after the conversion"
        if isinstance(module, nn.Embedding):
            return _LOOKUP
        if "router" in type(module).__name__.lower() or name.endswith(".gate.weight"):
            return _ROUTER
        return f"{type(module).__name__} is neither a linear layer nor fused experts"


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    for prefix, parent in model.named_modules():
        for attribute, module in parent._modules.items():
            if module is not None:
                yield f"{prefix}.{attribute}" if prefix else attribute, parent, attribute, module


def _nothing() -> None:
    """Undo of a model that was converted while loading: there is nothing to go back to."""


def _tied(model: Any, head: Any, embedding: Any) -> bool:
    """Whether head and embedding share a weight, or will once the model's mapping is followed (meta models)."""
    if head is None or embedding is None:
        return False
    names = {id(module): name for name, module in model.named_modules()}
    mapping = getattr(model, "all_tied_weights_keys", {})
    pair = f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"
    return head.weight is embedding.weight or mapping.get(pair[0]) == pair[1]


def _untie(model: Any) -> None:
    """Take ties of packed modules out of the model's mapping; they share one table instead."""
    gone = {name for name in _tie_names(model) if not _has_parameter(model, name)}
    if gone:
        ties = model.all_tied_weights_keys
        model.all_tied_weights_keys = {a: b for a, b in ties.items() if a not in gone and b not in gone}
        model._tied_weights_keys = None  # tie_weights() recomputes the mapping from it


def _tie_names(model: Any) -> set[str]:
    ties = getattr(model, "all_tied_weights_keys", {})
    return {*ties.keys(), *ties.values()}


def _has_parameter(model: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    return not isinstance(module, PackedModule) and last in module._parameters


def _untie_later(model: Any) -> Undo:
    """What brings back the tie mapping as it is now."""
    missing = object()
    before = {
        name: model.__dict__.get(name, missing) for name in ("all_tied_weights_keys", "_tied_weights_keys")
    }

    def restore() -> None:
        for name, value in before.items():
            if value is missing:
                model.__dict__.pop(name, None)
            else:
                model.__dict__[name] = value

    return restore
