"""Are the answers the same? Logits and tokens against the unoptimized model on fixed inputs.

Logits are compared in two ways, because a technique may act in only one of them: whole windows in one forward
pass, and token by token through the cache, teacher-forced inside `generate`. Of distances the worse way is
reported; agreement and perplexity are over the positions of both, as one of few positions would be coarse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from optimizations.repeatable import repeatable
from pytest_inferencepio import stats, workloads
from pytest_inferencepio.measure.metrics import from_estimate
from pytest_inferencepio.record import Metric, metric, not_measured
from pytest_inferencepio.tasks.text import heldout_tokens

if TYPE_CHECKING:
    from optimizations.runner import Runner
    from pytest_inferencepio.measure.budget import Budget

_NOT_FINITE = "the logits of one side are NaN or infinite, or give a true token no probability"
_LOG_MAX = math.log(1e300)
_Z = NormalDist().inv_cdf((1 + stats.CONFIDENCE) / 2)


@dataclasses.dataclass(frozen=True)
class Logits:
    """Next-token logits of one way of computing them, float32 [N, V], and the true next tokens, int64 [N]."""

    logits: torch.Tensor
    targets: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Answers:
    """Everything about a runner that the metrics compare; of the reference, computed once and kept."""

    windows: Logits
    decoded: Logits
    generated: torch.Tensor  # int64 [prompts, tokens], greedy


class ForcedTokens(LogitsProcessor):
    """Records the raw logits of every step of `generate` and forces the known next token.

    Indexed by position, so that steps which verify several positions at once are recorded in place.
    """

    def __init__(self, prompt_length: int, tokens: torch.Tensor) -> None:
        self.prompt_length, self.tokens = prompt_length, tokens
        self.recorded: dict[int, torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        if step >= len(self.tokens):  # a draft past the end
            return scores
        self.recorded[step] = scores[0].detach().to("cpu", torch.float32, copy=True)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[step]] = 0.0
        return forced

    def logits(self) -> torch.Tensor:
        """float32 [steps, V] in order of position."""
        return torch.stack([self.recorded[step] for step in range(len(self.tokens))])


def window_logits(runner: Runner, windows: torch.Tensor) -> Logits:
    """Teacher-forced logits of each window (int64 [W, length]), one forward pass per window."""
    rows = [_forward(runner, window[None])[0, :-1] for window in windows]
    return Logits(torch.cat(rows), windows[:, 1:].reshape(-1))


def decoded_logits(runner: Runner, inputs: Mapping[str, Any], continuation: torch.Tensor) -> Logits:
    """Teacher-forced logits of `continuation` (int64 [n]) after `inputs` [1, prompt], through `generate`'s cache."""
    forced = ForcedTokens(inputs["input_ids"].shape[1], continuation)
    runner.generate(
        **inputs,
        max_new_tokens=len(continuation),  # a minimum would forbid the end token: -inf among the raw logits
        do_sample=False,
        logits_processor=LogitsProcessorList([forced]),
    )
    return Logits(forced.logits(), continuation)


def greedy(runner: Runner, prompts: Sequence[Mapping[str, Any]], new_tokens: int) -> torch.Tensor:
    """Greedy continuations, int64 [prompts, new_tokens]."""
    rows = []
    for inputs in prompts:
        ids = runner.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        rows.append(ids[0, -new_tokens:].cpu())
    return torch.stack(rows)


@repeatable()
def answers(runner: Runner, budget: Budget, seed: int = 0) -> Answers:
    """What the metrics compare, on inputs that are the same for the same budget, seed and tokenizer.

    A model that takes images decodes half of the tokens behind one, and generates from it too.
    """
    text = heldout(runner, budget)
    # Of the text behind the first window, which may be the only one.
    continuation = _heldout_ids(runner, budget.window + budget.decoded_tokens)[budget.window :]
    first = text[:1].to(runner.model.device)
    prompts: list[Mapping[str, Any]] = [
        workloads.prompt(runner, budget.prompt_tokens, seed + index) for index in range(budget.generations)
    ]
    decoded: list[Mapping[str, Any]] = [{"input_ids": first, "attention_mask": torch.ones_like(first)}]
    if getattr(runner.processor, "image_processor", None) is not None:
        prompts.append(workloads.image_prompt(runner, budget.prompt_tokens // 4, seed, budget.image_size))
        decoded.append(prompts[-1])
    pieces = continuation.tensor_split(len(decoded))
    return Answers(
        window_logits(runner, text),
        _joined(
            [decoded_logits(runner, inputs, piece) for inputs, piece in zip(decoded, pieces, strict=True)]
        ),
        greedy(runner, prompts, budget.generation_tokens),
    )


def heldout(runner: Runner, budget: Budget) -> torch.Tensor:
    """Held-out text as windows, int64 [W, window]; without a tokenizer seeded random ids."""
    count = budget.heldout_tokens // budget.window * budget.window
    return _heldout_ids(runner, count).reshape(-1, budget.window)


def _heldout_ids(runner: Runner, count: int) -> torch.Tensor:
    """The first `count` ids of that text, int64 [count]; a shorter request is the beginning of a longer one."""
    if callable(runner.tokenizer):
        return torch.tensor(heldout_tokens(runner.tokenizer, count))
    return torch.tensor(workloads.token_ids(runner, count))


def similarity_metrics(reference: Answers, after: Answers) -> dict[str, Metric]:
    """`kl_divergence`, `logit_error` (the worse way), `top1_agreement` (all positions), `generation_match`."""
    ways = [(reference.windows, after.windows), (reference.decoded, after.decoded)]
    return {
        "kl_divergence": _worst(_kl(*way) for way in ways),
        "logit_error": _worst(_logit_error(*way) for way in ways),
        "top1_agreement": _top1(*map(_pooled, (reference, after))),
        "generation_match": generation_match(reference.generated, after.generated),
    }


def perplexity_metrics(reference: Answers | None, after: Answers) -> dict[str, Metric]:
    """`perplexity` over every teacher-forced position, and its ratio to the reference's, paired by position."""
    losses = _nll(_pooled(after))
    found = {"perplexity": _exp_mean("perplexity", losses)}
    if reference is not None:
        found["perplexity_ratio"] = _exp_mean("perplexity_ratio", losses - _nll(_pooled(reference)))
    return found


def generation_match(reference: torch.Tensor, after: torch.Tensor) -> Metric:
    """Share of greedy tokens before the first difference; what follows a difference answers another prompt."""
    same = (reference == after).to(torch.int64).cumprod(dim=1)
    return metric("generation_match", same.double().mean().item(), n=same.numel())


def gradient_error(reference: Runner, after: Runner, window: torch.Tensor) -> Metric:
    """Relative distance of the loss gradients with respect to the input embeddings, both in the model's dtype.

    Not measured when the techniques applied let no gradient through (`differentiable`).
    """
    blocking = [part.name for part in after.applied if not part.differentiable]
    if blocking:
        return not_measured("gradient_error", f"{', '.join(blocking)}: no gradient flows by design")
    base, found = _input_gradient(reference, window), _input_gradient(after, window)
    if not torch.isfinite(found).all() or not found.any():
        return metric("gradient_error", 1.0)
    return metric("gradient_error", ((found - base).norm() / base.norm()).item(), n=window.numel())


def _forward(runner: Runner, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits float32 on the CPU, [B, n, V]."""
    ids = ids.to(runner.model.device)
    inputs.setdefault("attention_mask", torch.ones_like(ids))
    return runner.forward(input_ids=ids, **inputs).logits.to("cpu", torch.float32)


def _input_gradient(runner: Runner, window: torch.Tensor) -> torch.Tensor:
    """Gradient of the window's loss at the output of the input embedding, float32 [1, n, hidden].

    The embedding's output is made a leaf by a hook: `inputs_embeds` instead of ids would take another path
    through a vision model, which reuses positions of the image it saw last.
    """
    ids = window[None].to(runner.model.device)
    leaves: list[torch.Tensor] = []

    def make_leaf(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hook = runner.model.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        with torch.enable_grad():
            logits = runner.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
            (gradient,) = torch.autograd.grad(loss, leaves[-1])
    finally:
        hook.remove()
    return gradient.float()


def _joined(ways: Sequence[Logits]) -> Logits:
    return Logits(torch.cat([way.logits for way in ways]), torch.cat([way.targets for way in ways]))


def _pooled(answers: Answers) -> Logits:
    """The positions of both ways together."""
    return _joined((answers.windows, answers.decoded))


def _nll(way: Logits) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(way.logits, way.targets, reduction="none").double()


def _kl(reference: Logits, after: Logits) -> Metric:
    """Mean over positions of KL(reference || after) in nats; rounding below zero counts as zero."""
    p, q = (torch.log_softmax(way.logits.double(), dim=-1) for way in (reference, after))
    return _mean("kl_divergence", (p.exp() * (p - q)).sum(-1).clamp_min(0.0))


def _logit_error(reference: Logits, after: Logits) -> Metric:
    """Norm of the difference over norm of the reference, both without each position's mean (softmax ignores it)."""
    base = reference.logits - reference.logits.mean(-1, keepdim=True)
    error = after.logits - after.logits.mean(-1, keepdim=True) - base
    ratio = (error.norm() / base.norm().clamp_min(1e-12)).item()
    if not math.isfinite(ratio):
        return not_measured("logit_error", _NOT_FINITE)
    return metric("logit_error", ratio, n=len(base))


def _top1(reference: Logits, after: Logits) -> Metric:
    same = int((reference.logits.argmax(-1) == after.logits.argmax(-1)).sum())
    return from_estimate("top1_agreement", stats.wilson(same, len(reference.logits)))


def _mean(name: str, values: torch.Tensor) -> Metric:
    mean, half = _mean_and_half(values)
    if not math.isfinite(mean):
        return not_measured(name, _NOT_FINITE)
    return metric(name, mean, max(mean - half, 0.0), mean + half, len(values))


def _exp_mean(name: str, values: torch.Tensor) -> Metric:
    mean, half = _mean_and_half(values)
    if not mean + half < _LOG_MAX:
        return not_measured(name, _NOT_FINITE)
    return metric(name, math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(values))


def _mean_and_half(values: torch.Tensor) -> tuple[float, float]:
    """Mean and half the width of its normal interval (hundreds of positions)."""
    spread = values.std().item() if len(values) > 1 else 0.0
    return values.mean().item(), _Z * spread / math.sqrt(len(values))


def _worst(metrics: Iterable[Metric]) -> Metric:
    """The worse of the ways; one that could not be measured is the worst."""

    def badness(one: Metric) -> float:
        if one.value is None:
            return math.inf
        return one.value if one.better == "lower" else -one.value

    return max(metrics, key=badness)
