"""What an optimization is: a frozen configuration, a refusal in words, a change with an exact undo.

A technique is one module with one frozen dataclass deriving from `Optimization`. The registry finds it by
importing the module; nothing else has to be touched.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from optimizations.errors import InvalidSpec, Refusal

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from optimizations.runner import Runner

Undo = Callable[[], None]


class Kind(enum.Enum):
    """What a technique changes. The order of the members is the order of composition."""

    WEIGHTS = "weights"
    CACHE = "cache"
    VISION = "vision"
    COMPUTE = "compute"
    STORAGE = "storage"
    RUNTIME = "runtime"

    @property
    def order(self) -> int:
        return list(Kind).index(self)


class Fidelity(enum.Enum):
    """How far the answers may move."""

    BITWISE = "bitwise"  # identical logits and tokens
    ROUNDING = "rounding"  # same mathematics in another order of operations
    LOSSY = "lossy"  # another function within the declared budget


@dataclasses.dataclass(frozen=True)
class AccuracyBudget:
    """How much accuracy a technique may cost, against the unoptimized model on the same inputs.

    `max_kl_divergence` is in nats per token (mean), `min_top1_agreement` a fraction of positions,
    `max_perplexity_ratio` after / before, `max_task_drop` an absolute fraction of exact matches.
    """

    max_kl_divergence: float
    min_top1_agreement: float
    max_perplexity_ratio: float
    max_task_drop: float


BITWISE_BUDGET = AccuracyBudget(0.0, 1.0, 1.0, 0.0)
# bf16 has 8 significant bits: reordered sums move logits by about 2^-8 relative per layer.
ROUNDING_BUDGET = AccuracyBudget(2e-3, 0.98, 1.01, 0.02)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a technique may know before any weight is loaded: enough to refuse, nothing more."""

    config: PreTrainedConfig
    device: str = "cpu"
    dtype: str = "bfloat16"

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)


@dataclasses.dataclass(frozen=True)
class Optimization(ABC):
    """One technique with its settings.

    Subclasses are frozen dataclasses whose fields are JSON scalars, validated in `__post_init__` by raising
    `InvalidSpec`. The class docstring is the documentation: what it does, its source, its bound.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    fidelity: ClassVar[Fidelity]
    summary: ClassVar[str]  # one line for --pio-list
    source: ClassVar[str]  # paper or project
    budget: ClassVar[AccuracyBudget]
    differentiable: ClassVar[bool] = False  # gradients flow through the optimized model
    conflicts: ClassVar[Mapping[str, str]] = {}  # other technique's name -> reason they cannot compose
    # Large modules that applying imports. A run imports them first: garbage collections then leave them out.
    imports: ClassVar[Sequence[str]] = ()
    compiles: ClassVar[bool] = False  # applying compiles code that is kept on disk for later processes

    @abstractmethod
    def refusal(self, target: Target) -> str | None:
        """The reason this technique refuses `target`, in words, or None when it applies."""

    @abstractmethod
    def apply(self, runner: Runner) -> Undo:
        """Change `runner` in place; the returned callable restores it exactly (weights, hooks, ties,
        config, generation settings). Called only when `refusal` returned None."""

    def figures(self, runner: Runner) -> Mapping[str, float]:
        """What the technique counted on `runner` since it was applied, by the record's names of metrics."""
        return {}

    def unread(self, runner: Runner) -> Collection[str]:
        """Names of tensors in the model that decoding one token does not read, kept for other passes."""
        return ()

    def remarks(self, runner: Runner) -> Sequence[str]:
        """Sentences about what the technique did on `runner`, for the report: what it read, what it left out."""
        return ()

    def convert_meta(self, model: nn.Module) -> None:
        """Replace modules of a model on the meta device by ones that take their weights while loading.

        Weight techniques override this. Replaced modules offer `load_weight(name, tensor)`, called once per
        original parameter with the name it had inside the replaced module, so the unconverted copy of the
        model never exists. After loading, `apply` on such a model is the identity and its undo does nothing.

        Raises:
            Refusal: this technique does not convert while loading.
        """
        raise Refusal(f"{self.name} cannot be applied while loading; load the model first")

    @classmethod
    def converts_while_loading(cls) -> bool:
        return cls.convert_meta is not Optimization.convert_meta

    @classmethod
    def search_space(cls) -> dict[str, Sequence[Any]]:
        """Field name -> values worth trying, for tuning. The default has nothing to tune."""
        return {}

    def spec(self) -> str:
        """Canonical text, e.g. `weight_int4(group_size=64)`: only settings that differ from the default."""
        changed = [
            f"{field.name}={_setting_text(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({','.join(changed)})" if changed else self.name

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "config": dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Optimization:
        """Build from a mapping of field names to values.

        Raises:
            InvalidSpec: an unknown setting, or a value the technique rejects.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in settings:
            if key not in known:
                offered = ", ".join(sorted(known)) or "none"
                raise InvalidSpec(f"{cls.name} has no setting {key!r}; it has: {offered}")
        try:
            return cls(**settings)
        except TypeError as error:
            raise InvalidSpec(f"{cls.name}: {error}") from error


def _setting_text(value: Any) -> str:
    """A setting as it is written in a specification: bare words stay bare, other text is quoted."""
    return value if isinstance(value, str) and value.isidentifier() else repr(value)
