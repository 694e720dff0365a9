"""What can go wrong, named by situation. Knows nothing of the rest."""

from __future__ import annotations


class PioError(Exception):
    """Base of every error the plugin raises on purpose; the message says what, why and what to do."""


class UnknownName(PioError):
    """A model, category or scale that does not exist; the message lists the near ones."""


class CheckpointError(PioError):
    """A checkpoint that cannot be used: another model, truncated, no tokenizer."""


class NotEnoughMemory(PioError):
    """The machine has less memory than the work needs; says how much is missing and what would fit."""


class NotMeasurable(PioError):
    """A quantity that this machine cannot measure; the reason is the message and goes into the record."""


class ImpossibleFigure(PioError):
    """A measured figure above what this machine can do; says which ceiling it exceeds."""


class MeasurementFailed(PioError):
    """Work in a fresh process failed, ran out of time or was killed; carries its traceback or signal."""


class BaselineError(PioError):
    """A baseline that is corrupt, foreign or of another schema."""


class RecordError(PioError):
    """A record that breaks the schema."""
