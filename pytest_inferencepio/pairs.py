"""The loaded models of a run: at most one unoptimized reference and one optimized copy at a time."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_inferencepio.errors import NotEnoughMemory
from pytest_inferencepio.models import LoadRequest
from pytest_inferencepio.options import Settings
from pytest_inferencepio.selection import Row

if TYPE_CHECKING:
    from optimizations.contract import Undo
    from optimizations.runner import Runner
    from pytest_inferencepio.catalog.loading import Loaded


_NO_ROOM = "the unoptimized model was not kept, to make room for peers"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both sides of a row.

    `before` is the unoptimized model, or None with the reason in `why_no_before`. `conversion_time` is what the
    composition cost once, in seconds: applying it, or loading into its form where it converts while loading.
    `source` says where the weights came from (never a path, which would differ between machines), `notes` what the loader has to say for the report.
    """

    row: Row
    after: Runner
    before: Runner | None
    why_no_before: str
    conversion_time: float
    source: str
    notes: tuple[str, ...] = ()


class Pairs:
    """Loads the pair of a row and keeps it until another row is asked for; the reference as long as the model.

    The optimized side is a fresh copy for every row, so that no row depends on which rows ran before it.
    """

    def __init__(self, settings: Settings, checkpoints: Mapping[str, str]) -> None:
        self._settings = settings
        self._checkpoints = checkpoints
        self._pair: Pair | None = None
        self._undo: Undo | None = None
        self._reference: tuple[tuple[str, str], Runner] | None = None

    def get(self, row: Row) -> Pair:
        """Both sides of `row`, loaded on first use.

        Raises:
            NotEnoughMemory: not even the optimized side fits.
            Refusal: a technique refuses the loaded model.
            CheckpointError: the checkpoint cannot be used.
        """
        if self._pair is None or self._pair.row != row:
            self.release(keep_reference_of=row)
            self._pair = self._load(row)
        return self._pair

    def release(self, *, keep_reference_of: Row | None = None) -> None:
        """Undo the optimizations and drop the models; the reference stays if `keep_reference_of` is its row."""
        undo, self._undo, self._pair = self._undo, None, None
        if keep_reference_of is None or not self._is_reference_of(keep_reference_of):
            self._reference = None
        if undo is not None:
            undo()
        del undo  # it holds the runner, whose memory may be wanted next
        gc.collect()

    def drop_reference(self, row: Row) -> None:
        """Drop the unoptimized side and keep (or load) only the optimized one of `row`.

        It is loaded again with the next row; what else of this row asks for it gets the reason why it is not there.
        """
        if self._pair is None or self._pair.row != row:
            self.release()
            self._pair = self._load(row, reference=False)
        elif self._pair.before is not None:
            self._reference = None
            self._pair = dataclasses.replace(self._pair, before=None, why_no_before=_NO_ROOM)
            gc.collect()

    def request(self, row: Row, *, optimized: bool) -> LoadRequest:
        """How one side of `row` is loaded; only what converts while loading is passed to the loader."""
        converting = tuple(part for part in row.parts if part.converts_while_loading())
        return LoadRequest(
            scale=row.scale,
            device=self._settings.device,
            dtype=self._settings.dtype,
            seed=self._settings.seed,
            checkpoint=self._checkpoints.get(row.model.name) if row.scale == "full" else None,
            optimizations=converting if optimized and row.scale == "full" else (),
        )

    def _load(self, row: Row, *, reference: bool = True) -> Pair:
        try:
            after, seconds = self._load_optimized(row)
        except NotEnoughMemory:
            if self._reference is None:
                raise
            self.release()  # the reference may be what is in the way
            after, seconds = self._load_optimized(row)
        before, why = self._load_reference(row) if reference else (None, _NO_ROOM)
        source = after.source if after.source in ("reference", "random", "custom") else "checkpoint"
        return Pair(row, after.runner, before, why, seconds, source, after.notes)

    def _load_optimized(self, row: Row) -> tuple[Loaded, float]:
        """The optimized side and the seconds that optimizing took."""
        from optimizations.session import apply_all

        request = self.request(row, optimized=True)
        start = time.perf_counter()
        loaded = row.model.load(request)
        if not request.optimizations:  # converting while loading is not separable from loading
            start = time.perf_counter()
        self._undo = apply_all(loaded.runner, row.parts)
        return loaded, time.perf_counter() - start

    def _load_reference(self, row: Row) -> tuple[Runner | None, str]:
        if self._reference is None:
            try:
                runner = row.model.load(self.request(row, optimized=False)).runner
            except NotEnoughMemory as error:
                return None, f"the unoptimized model does not fit beside the optimized one: {error}"
            self._reference = ((row.model.name, row.scale), runner)
        return self._reference[1], ""

    def _is_reference_of(self, row: Row) -> bool:
        return self._reference is not None and self._reference[0] == (row.model.name, row.scale)
