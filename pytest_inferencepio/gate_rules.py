"""How each metric is judged: which rule, which tolerance, and why that number.

| rule | metrics | travels to another machine |
|---|---|---|
| RATIO | speedups measured in one run | yes, with a wider tolerance |
| EXACT | byte counts read from the model, counts | yes, exactly |
| PERPLEXITY, DIVERGENCE, AGREEMENT, TASK | answers on fixed inputs | yes, with a tolerance for rounding |
| COUNT | nearly deterministic rates | yes, with a tolerance |
| MEMORY, ENERGY | peaks, joules | no |
| MEMORY_RATIO | peak after / before | yes; used only where MEMORY does not travel |
| INFORMATION | absolute times and rates, and what a technique adapts to them | never gated |
"""

from __future__ import annotations

import dataclasses
import enum
import math

from pytest_inferencepio import units


class Rule(enum.Enum):
    """Kinds of judgement; see the table above."""

    RATIO = "ratio"
    EXACT = "exact"
    PERPLEXITY = "perplexity"
    DIVERGENCE = "divergence"
    AGREEMENT = "agreement"
    TASK = "task"
    COUNT = "count"
    MEMORY = "memory"
    MEMORY_RATIO = "memory ratio"
    ENERGY = "energy"
    INFORMATION = "information"


RULES: dict[str, Rule] = {
    "speedup": Rule.RATIO,
    "prefill_speedup": Rule.RATIO,
    "decode_speedup": Rule.RATIO,
    "throughput_ratio": Rule.RATIO,
    "weight_memory": Rule.EXACT,
    "weight_memory_ratio": Rule.EXACT,
    "kv_bytes_per_token": Rule.EXACT,
    "recompilations": Rule.EXACT,
    "nonfinite_outputs": Rule.EXACT,
    "perplexity": Rule.PERPLEXITY,
    "perplexity_ratio": Rule.PERPLEXITY,
    "kl_divergence": Rule.DIVERGENCE,
    "logit_error": Rule.DIVERGENCE,
    "gradient_error": Rule.DIVERGENCE,
    "top1_agreement": Rule.AGREEMENT,
    "generation_match": Rule.AGREEMENT,
    "task_exact_match": Rule.TASK,
    "bytes_read_per_token": Rule.COUNT,
    "peak_memory": Rule.MEMORY,
    "model_peak_memory": Rule.MEMORY,
    "allocator_peak": Rule.MEMORY,
    "memory_ratio": Rule.MEMORY_RATIO,
    "model_memory_ratio": Rule.MEMORY_RATIO,
    "energy_per_token": Rule.ENERGY,
}

# The peak whose ratio it is.
PEAK_OF = {"memory_ratio": "peak_memory", "model_memory_ratio": "model_peak_memory"}

# Samples kept in a baseline per machine: quantities that vary from run to run need their spread, answers on
# fixed inputs and byte counts do not.
KEPT_SESSIONS = 5
VARYING = (Rule.RATIO, Rule.MEMORY, Rule.MEMORY_RATIO, Rule.ENERGY)


def rule_of(metric: str) -> Rule:
    """The rule of `metric`; what has none is information."""
    return RULES.get(metric, Rule.INFORMATION)


def sessions_kept(metric: str) -> int:
    """How many sessions of one machine a baseline keeps of `metric`."""
    return KEPT_SESSIONS if rule_of(metric) in VARYING else 1


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What the gate tolerates. Fractions are relative (0.03 is 3 %) unless the name says otherwise."""

    # Speed: worse than 1 + delta at the median, and proven worse than 1 + delta / 2.
    speed: float = 0.03
    aa_noise: float = 0.0  # this machine's own noise between two equal models, when it was measured
    # A ratio of two programs on one machine depends on its balance of arithmetic and bandwidth. Between CPUs of
    # one instruction set that balance differs by well under 2x, so a technique loses part of its gain, not all.
    speed_foreign: float = 0.30
    # Kernels of another instruction set are other programs: only "less than half of the stored gain" is news.
    speed_foreign_isa: float = 1.0
    confidence: float = 0.95  # of each one-sided bound
    # A pass must exclude a slow-down of this size, otherwise it is inconclusive.
    excluded: float = 0.10

    # Answers. On one machine fixed inputs gave the same logits bit by bit; AVX2 against AVX-512 moved the perplexity
    # of a tiny bf16 model by 1e-5 of itself, KL divergences of quantized ones by 1e-4 of theirs, no top-1 token of
    # 1,100. Ten times that on the same machine (thread counts of libraries, patch releases), some hundred times on
    # others, whose BLAS and bf16 instructions may round in other places.
    perplexity: float = 1e-4
    perplexity_foreign: float = 2e-3
    divergence: float = 0.02
    divergence_floor: float = 1e-6  # nat
    divergence_foreign: float = 0.20
    divergence_floor_foreign: float = 1e-4
    agreement: float = 0.005  # absolute, and at least this many of the n positions: near ties flip one by one
    agreement_flips: int = 1
    agreement_foreign: float = 0.02
    agreement_flips_foreign: int = 3
    # Our kernels of another instruction set are other programs, in their answers too. Between AVX-512 and AMX, tiny
    # references: perplexity by 0.39 %, KL by 67 % (weight_int8), generation_match by 0.21 (weight_int4, 48 tokens), as a
    # chain that takes another token goes another way; top1_agreement within what other machines may. Such a change is no news, and no proof that there is none:
    # inconclusive until a session of this instruction set is stored.
    perplexity_isa: float = 0.01
    divergence_isa: float = 1.0
    generation_isa: float = 0.25  # absolute
    task: float = 0.02  # absolute
    task_foreign: float = 0.05
    task_p_value: float = 0.05
    count: float = 0.02
    count_foreign: float = 0.10

    # Memory: both must be exceeded. Four to ten fresh processes doing the same on one machine peaked within 0.6 MB of
    # each other (six techniques, all tiny models; measure/processes.py says what that takes), 22 cells in three runs
    # within 0.7 MB.
    memory: float = 0.02
    memory_floor: float = 2e6  # B
    # Only judged against other machines. There the libraries' scratch memory differs: bf16 products on a CPU with
    # matrix units (AMX) moved the model's part of a tiny peak by 15 to 25 % against one without.
    memory_ratio: float = 0.35
    energy: float = 0.10
    # Absolute times only inform, and only when they moved this much on the same machine.
    information: float = 0.50


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a deterministic value may worsen: relative * |before| + absolute, in the metric's unit."""

    relative: float = 0.0
    absolute: float = 0.0

    def allowed(self, before: float) -> float:
        return self.relative * abs(before) + self.absolute

    def __str__(self) -> str:
        parts = [units.share(self.relative)] if self.relative else []
        parts += [f"{self.absolute:.3g}"] if self.absolute else []
        return f"allowed: {' + '.join(parts) or 'none'}"


# Fractions are stored with six significant digits, so equality means equality of those; whole numbers exactly.
STORED_DIGITS = 6
_ROUNDING = 0.5 * 10.0 ** (1 - STORED_DIGITS)


def tolerance_of(rule: Rule, limits: Thresholds, *, same_machine: bool, n: int) -> Tolerance:
    """The tolerance of a deterministic rule over `n` positions; KeyError for rules that judge otherwise."""
    flips, foreign_flips = (
        (count + 0.5) / max(n, 1) for count in (limits.agreement_flips, limits.agreement_flips_foreign)
    )
    pairs = {
        Rule.EXACT: (Tolerance(_ROUNDING), Tolerance(_ROUNDING)),
        Rule.PERPLEXITY: (Tolerance(limits.perplexity), Tolerance(limits.perplexity_foreign)),
        Rule.DIVERGENCE: (
            Tolerance(limits.divergence, limits.divergence_floor),
            Tolerance(limits.divergence_foreign, limits.divergence_floor_foreign),
        ),
        Rule.AGREEMENT: (
            Tolerance(0, max(limits.agreement, flips)),
            Tolerance(0, max(limits.agreement_foreign, foreign_flips)),
        ),
        Rule.TASK: (Tolerance(0, limits.task), Tolerance(0, limits.task_foreign)),
        Rule.COUNT: (Tolerance(limits.count), Tolerance(limits.count_foreign)),
    }
    return pairs[rule][0 if same_machine else 1]


def between_instruction_sets(metric: str, limits: Thresholds) -> Tolerance | None:
    """How far an optimization's answers on one instruction set may be from those on another; None: as on other machines."""
    if metric == "generation_match":
        return Tolerance(0, limits.generation_isa)
    return {
        Rule.PERPLEXITY: Tolerance(limits.perplexity_isa),
        Rule.DIVERGENCE: Tolerance(limits.divergence_isa, limits.divergence_floor_foreign),
    }.get(rule_of(metric))


# A run makes some 200 comparisons of ratios, so three standard deviations would alarm falsely in every third run.
# Simulated for one ratio with 5 stored sessions (tests/gate/test_gate_catches.py has the noise, of pairs / between
# sessions): percent that fail when unchanged / 5 / 10 / 20 % slower, at three deviations and at four.
#   calm    1.4 / 0.5 %    0.00 / 99 / 100 / 100    0.00 / 73 / 100 / 100
#   shared  2.8 / 1.5 %    1.05 / 42 / 99 / 100     0.20 / 15 / 92 / 100
#   noisy   4.2 / 3.0 %    2.0 / 25 / 65 / 98       0.60 / 9 / 39 / 88
# Each of 2,000 unchanged and 300 to 500 slower trials over 40 baselines. False alarms come from a bias above the assumed
# one that a single ratio has not shown in five sessions; a technique's others show it too.
DEVIATIONS = 4.0


def allowance(variance: float, least: float = 0.0) -> float:
    """Slow-down that a `variance` of ln(ratio) alone explains: four standard deviations, at least `least`."""
    return max(least, math.expm1(DEVIATIONS * math.sqrt(variance))) if math.isfinite(variance) else math.inf
