"""What a benchmark test holds in its hands: both sides of a row, timing, and the conclusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from pytest_inferencepio.errors import NotEnoughMemory, PioError
from pytest_inferencepio.record import Metric, Record

if TYPE_CHECKING:
    from optimizations.contract import AccuracyBudget, Optimization
    from optimizations.runner import Runner
    from pytest_inferencepio.measure.budget import Budget
    from pytest_inferencepio.measure.latency import Generation
    from pytest_inferencepio.measure.processes import FreshProcesses
    from pytest_inferencepio.measure.timing import Paired
    from pytest_inferencepio.models import LoadRequest
    from pytest_inferencepio.pairs import Pair
    from pytest_inferencepio.peers.contract import Peer
    from pytest_inferencepio.selection import Row
    from pytest_inferencepio.session import Run
    from pytest_inferencepio.targets import Targets

Sample = TypeVar("Sample")

_AGAIN = 3  # samples of a test whose pairs another one measured


class Measurement:
    """One cell being measured.

    The models are loaded when first asked for: `after` is the optimized runner, `before` the unoptimized one or
    None (`pair.why_no_before` says why). `budget` says how much is measured, `seed` seeds every input.
    """

    def __init__(self, run: Run, row: Row, benchmark: Any, category: str) -> None:
        self._run = run
        self.row = row
        self.benchmark = benchmark
        self.category = category
        self.seed = run.settings.seed
        self.device = run.settings.device
        self.dtype = run.settings.dtype
        self.concluded = False
        self._about: tuple[str, tuple[str, ...]] | None = (
            None  # source of the weights, notes about both sides
        )

    @property
    def pair(self) -> Pair:
        found = loaded_pair(self._run, self.row)
        self._about = about(found)
        return found

    @property
    def after(self) -> Runner:
        return self.pair.after

    @property
    def before(self) -> Runner | None:
        return self.pair.before

    @property
    def budget(self) -> Budget:
        return self._run.budget(self.row.scale)

    @property
    def targets(self) -> Targets:
        return self._run.settings.targets

    @property
    def checkpoint(self) -> str | None:
        return self._run.pairs.request(self.row, optimized=True).checkpoint

    @property
    def load_request(self) -> LoadRequest:
        """How the unoptimized model of this row is loaded."""
        return self._run.pairs.request(self.row, optimized=False)

    @property
    def peers(self) -> dict[str, Peer]:
        """The peers that this run compares with."""
        from pytest_inferencepio.peers.registry import peers

        known = peers()
        return {name: known[name] for name in self._run.settings.peers}

    def make_room(self) -> None:
        """Load the optimized model, and drop the unoptimized one where it is large: what comes now needs its room."""
        if self.row.scale == "full":
            self._run.pairs.drop_reference(self.row)
        _ = self.pair

    def release(self) -> None:
        """Drop both models; they are loaded again when asked for."""
        self._run.pairs.release()

    @property
    def processes(self) -> FreshProcesses:
        """Fresh processes; both models are dropped first where they are large, so that a third copy fits."""
        if self.row.scale == "full":
            self._run.pairs.release()
        return self._run.processes()

    def no_room(self, *, optimized: bool) -> str:
        """Why a fresh process could not load this side of a full-scale catalog model, or an empty text."""
        from pytest_inferencepio.catalog.memory import check_memory

        if self.row.scale != "full":
            return ""
        self._run.pairs.release()
        converted = self._run.pairs.request(self.row, optimized=optimized).optimizations
        config = self.row.model.config(self.row.scale)
        try:
            check_memory(self.row.model.entry, config, self.device, self.dtype, converted)
        except NotEnoughMemory as error:
            return str(error)
        return ""

    def once(self, what: str, compute: Callable[[], Sample], *, of_reference: bool = False) -> Sample:
        """`compute()`, kept for the other categories of this row, or of this model if it is `of_reference`."""
        key = (what, self.row.model.name, self.row.scale, "" if of_reference else self.row.spec)
        if key not in self._run.kept:
            self._run.kept[key] = compute()
        found: Sample = self._run.kept[key]
        return found

    def inputs(self, tokens: int) -> dict[str, Any]:
        """A prompt [1, n] of `tokens` text tokens, behind a drawing for a model that takes images."""
        from pytest_inferencepio import workloads

        if self.row.model.entry.multimodal:
            return workloads.image_prompt(self.after, tokens, self.seed, self.budget.image_size)
        return workloads.prompt(self.after, tokens, self.seed)

    def interleave(
        self,
        work: Callable[[Runner], Sample],
        *,
        pairs: int | None = None,
        warmup: int | None = None,
        with_reference: bool = True,
        suspicious: Callable[[Paired[Sample]], bool] = lambda paired: False,
        beside: Callable[[], object] = lambda: None,
    ) -> Paired[Sample]:
        """Run `work` on both runners in turn; pytest-benchmark times the optimized side.

        Where the machine is noisy pairs are added, up to the budget's `most_pairs`, and up to its `suspect_pairs`
        while they are `suspicious` or to be stored, unless `pairs` says how many. Without a reference (or with
        `with_reference` false) only the optimized side runs, and `Paired.before` stays empty. `beside` runs after
        every round and is not timed.
        """
        from pytest_inferencepio.measure.timing import Interleaver, pairs_wanted

        reference = self.before if with_reference else None
        interleaver: Interleaver[Sample] = Interleaver(
            None if reference is None else (lambda: work(reference)),
            lambda: work(self.after),
            warmup=self.budget.warmup if warmup is None else warmup,
            seed=self.seed,
            device=self.device,
            beside=beside,
        )
        if pairs is not None:
            return interleaver.benchmark(self.benchmark, pairs)
        plan = self.budget
        # What is stored judges many runs: it is measured as long as what is suspected.
        most = plan.suspect_pairs if self._run.settings.update_baseline else plan.most_pairs
        return interleaver.benchmark(
            self.benchmark,
            plan.pairs,
            further=lambda paired: pairs_wanted(paired, most, plan.suspect_pairs, suspicious),
        )

    def generations(self) -> Paired[Generation]:
        """Pairs of greedy generations by the budget, kept for the other categories of this row.

        pytest-benchmark needs a sample of every test: where they were kept, the optimized side runs a few times more.
        """
        from pytest_inferencepio.measure import latency

        budget, inputs = self.budget, self.inputs(self.budget.prompt_tokens)

        def generate(runner: Runner) -> Generation:
            return latency.generate_once(runner, inputs, budget.new_tokens)

        def looks_slower(paired: Paired[Generation]) -> bool:
            metrics = latency.ratio_metrics(paired) if paired.before else {}
            return self._run.looks_slower(self._record(metrics, self.generation_workload(), ()))

        paired = self.once("generations", lambda: self.interleave(generate, suspicious=looks_slower))
        if self.benchmark.stats is None and not self.benchmark.disabled:
            self.benchmark.pedantic(lambda: generate(self.after), rounds=_AGAIN, warmup_rounds=1)
        return paired

    def generation_workload(self) -> dict[str, Any]:
        """What `generations` asks of the model; the tokens of an image are among the prompt's."""
        length = self.inputs(self.budget.prompt_tokens)["input_ids"].shape[1]
        return {"prompt_tokens": length, "new_tokens": self.budget.new_tokens, "batch": 1}

    def conclude(
        self,
        metrics: Mapping[str, Metric],
        workload: Mapping[str, Any] | None = None,
        notes: Iterable[str] = (),
    ) -> Record:
        """Record the metrics, compare them with the baseline, fail the test on a regression.

        Args:
            metrics: by the names of `record.METRICS`.
            workload: what the model was asked to do; records of different workloads are not compared.
            notes: sentences for the report.
        """
        record, why = self._concluded(metrics, workload, notes)
        if why:
            pytest.fail(why, pytrace=False)
        return record

    def not_measurable(
        self, metrics: Mapping[str, Metric], workload: Mapping[str, Any], reason: str, *, loaded: bool = True
    ) -> None:
        """Record why nothing could be measured here and skip the test with that reason.

        With `loaded` false the models are not loaded for it.
        """
        if not loaded and self._about is None:
            self._about = ("not loaded", ())
        _, why = self._concluded(metrics, workload, [reason])
        if why:
            pytest.fail(why, pytrace=False)
        pytest.skip(reason)

    def _concluded(
        self, metrics: Mapping[str, Metric], workload: Mapping[str, Any] | None, notes: Iterable[str]
    ) -> tuple[Record, str]:
        from optimizations.contract import BITWISE_BUDGET

        row, record = self.row, self._record(metrics, workload, notes)
        declared = accuracy_budget(row.parts) if row.parts else BITWISE_BUDGET
        verdict = self._run.judge(record, dataclasses.asdict(declared))
        record = dataclasses.replace(record, verdict=verdict.status.value)
        self.benchmark.extra_info["pio"] = record.to_json()
        self._run.measured.append((record, verdict))
        self.concluded = True
        return record, self._run.fails(verdict)

    def _record(
        self, metrics: Mapping[str, Metric], workload: Mapping[str, Any] | None, notes: Iterable[str]
    ) -> Record:
        source, told = self._about or about(self.pair)
        return Record(
            model=self.row.model.name,
            scale=self.row.scale,
            optimization=self.row.spec,
            category=self.category,
            device=self.device,
            dtype=self.dtype,
            workload={**(workload or {}), "weights": source, "seed": self.seed},
            metrics=dict(metrics),
            fingerprint=self._run.fingerprint(),
            notes=(*notes, *told),
        )


def about(pair: Pair) -> tuple[str, tuple[str, ...]]:
    """Where the weights came from, and what the report is to say about them."""
    return pair.source, (*pair.notes, *([pair.why_no_before] if pair.why_no_before else []))


def loaded_pair(run: Run, row: Row) -> Pair:
    """Both sides of `row`; a refusal skips the test and what cannot be loaded fails it, each in words."""
    from optimizations.errors import OptimizationError, Refusal

    try:
        return run.pairs.get(row)
    except Refusal as refusal:
        pytest.skip(str(refusal))
    except (OptimizationError, PioError) as error:
        pytest.fail(f"{row.id}: {error}", pytrace=False)


def accuracy_budget(parts: Iterable[Optimization]) -> AccuracyBudget:
    """What a composition may cost: divergences and drops add up, agreements and ratios multiply."""
    from optimizations.contract import BITWISE_BUDGET, AccuracyBudget

    total = BITWISE_BUDGET
    for part in parts:
        total = AccuracyBudget(
            total.max_kl_divergence + part.budget.max_kl_divergence,
            total.min_top1_agreement * part.budget.min_top1_agreement,
            total.max_perplexity_ratio * part.budget.max_perplexity_ratio,
            total.max_task_drop + part.budget.max_task_drop,
        )
    return total


def category_of(test_name: str) -> str:
    """The category that a test measures: its function's name without `test_`, so a user's test adds its own."""
    return test_name.removeprefix("test_")
