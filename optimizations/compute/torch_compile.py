"""Decoder layers compiled by torch.compile, one at a time."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from optimizations.compute.compiled_decode import CompiledDecode, CompileReport
from optimizations.compute.decoder_layers import decoder_layers
from optimizations.contract import ROUNDING_BUDGET, AccuracyBudget, Fidelity, Kind, Optimization, Target, Undo
from optimizations.errors import InvalidSpec

if TYPE_CHECKING:
    from optimizations.runner import Runner

MODES = ("default", "max-autotune-no-cudagraphs")
ATTACHED = "compiled_decode"  # attribute of the model while the technique is in force


@dataclasses.dataclass(frozen=True)
class TorchCompile(Optimization):
    """Compiles the decode step of one decoder layer (regional compilation) and runs all layers through it.

    Layers of one structure share one compiled graph:
    parameters, the layer's slice of the cache and its length are inputs, never constants, so 36 layers cost one
    compilation, and neither another prompt length, generation length nor batch size compiles again: there are
    two forms, a single row and a batch. `generate` gets a cache preallocated for its length. Prefill, training
    and caches brought by the caller take the uncompiled path. MoE layers run transformers' `grouped_mm` experts,
    as the eager expert loop depends on data and cannot be compiled.

    `apply` compiles (unless `warm_up` is false), so its duration is the conversion time; `recompilations`
    counts what was compiled after that, and is 0. Compiled kernels are kept in TorchInductor's cache directory
    (TORCHINDUCTOR_CACHE_DIR), so a second process compiles in a fraction of the time. Inductor's `freezing` stays
    off: it would keep a second, packed copy of the weights.

    Source: TorchDynamo and TorchInductor (Ansel et al., ASPLOS 2024); regional compilation in PyTorch's
    recipes.
    """

    name: ClassVar[str] = "torch_compile"
    kind: ClassVar[Kind] = Kind.COMPUTE
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING
    summary: ClassVar[str] = "compiles the decode step of a layer once and reuses it for all layers"
    source: ClassVar[str] = "PyTorch 2 (Ansel et al., ASPLOS 2024); regional compilation"
    # Rounding alone, but grouped experts sum in another order than the eager loop, and rounding that flips an
    # expert costs more: 0.0042 nats on the coder's reference, 0.0004 on the others.
    budget: ClassVar[AccuracyBudget] = dataclasses.replace(ROUNDING_BUDGET, max_kl_divergence=0.01)
    differentiable: ClassVar[bool] = True
    imports: ClassVar[Sequence[str]] = ("torch._dynamo", "torch._inductor.compile_fx")
    compiles: ClassVar[bool] = True
    conflicts: ClassVar[Mapping[str, str]] = {
        "kv_int8": "compiled layers read a preallocated cache in the model's dtype, not an int8 one",
        "prompt_lookup": "verifying drafts runs several tokens a step, which is never the compiled step of one",
        "continuous_batching": "the engine's paged attention runs packed sequences, never the compiled step",
    }

    mode: str = "default"
    warm_up: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidSpec(f"{self.name}: mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not isinstance(self.warm_up, bool):
            raise InvalidSpec(f"{self.name}: warm_up must be true or false, got {self.warm_up!r}")

    def refusal(self, target: Target) -> str | None:
        if target.device == "cpu":
            return missing_cpp_compiler()
        if target.device == "cuda":
            return missing_triton()
        return f"it is built for cpu and cuda, not for {target.device}"

    def apply(self, runner: Runner) -> Undo:
        model: Any = runner.model
        experts = model.get_experts_implementation()
        if "eager" in experts.values() and model._can_set_experts_implementation():
            model.set_experts_implementation("grouped_mm")
        decode = CompiledDecode(model, decoder_layers(model), self.mode)
        decode.install()
        setattr(model, ATTACHED, decode)

        def undo() -> None:
            delattr(model, ATTACHED)
            decode.remove()
            if model.get_experts_implementation() != experts:
                model.set_experts_implementation(experts)

        if self.warm_up:
            try:
                warm_up(runner)
            except BaseException:
                undo()
                raise
        decode.report.warmed_up = decode.report.compilations
        return undo

    def figures(self, runner: Runner) -> Mapping[str, float]:
        return {"recompilations": float(recompilations(runner))}

    @classmethod
    def search_space(cls) -> dict[str, Sequence[Any]]:
        return {"mode": MODES}


def warm_up(runner: Runner) -> None:
    """Compile both forms of the decode step: a single row, and a batch of padded rows."""
    with warnings.catch_warnings():
        # Dynamo traces through lru_cache-wrapped version checks in transformers and says so.
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        for mask in (torch.ones(1, 4), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])):
            mask = mask.to(runner.model.device, torch.int64)
            runner.generate(
                input_ids=mask, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False
            )


def recompilations(runner: Runner) -> int:
    """Graphs compiled since `apply` returned; LookupError when the technique is not in force."""
    report = compile_report(runner)
    return report.compilations - report.warmed_up


def compile_report(runner: Runner) -> CompileReport:
    """What was compiled for `runner` since the technique was applied; LookupError when it is not in force."""
    decode = getattr(runner.model, ATTACHED, None)
    if decode is None:
        raise LookupError("torch_compile is not applied to this model, so nothing counts its compilations")
    report: CompileReport = decode.report
    return report


def missing_cpp_compiler() -> str | None:
    """Why TorchInductor could not compile for the CPU here, or None."""
    from torch._inductor import config

    candidates = [each for each in config.cpp.cxx if each]
    if not any(shutil.which(each) for each in candidates):
        return (
            f"TorchInductor needs a C++ compiler and found none (looked for {', '.join(candidates)} on "
            f"PATH={os.environ.get('PATH', '')!r}); install g++ or clang++, or name one in the environment "
            "variable CXX before starting Python"
        )
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if sys.platform != "win32" and not headers.exists():
        return f"TorchInductor needs Python's C headers and {headers} does not exist; install python3-dev"
    return None


def missing_triton() -> str | None:
    """Why TorchInductor could not compile for a GPU here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "TorchInductor needs Triton to compile for a GPU and it is not installed; install triton"
    return None
