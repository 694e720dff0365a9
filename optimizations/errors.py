"""What can go wrong between an optimization and its user. Knows nothing of the rest."""

from __future__ import annotations


class OptimizationError(Exception):
    """Base of every error this package raises on purpose."""


class UnknownOptimization(OptimizationError):
    """A name that no discovered technique has; the message lists the near ones."""


class InvalidSpec(OptimizationError):
    """A specification such as `weight_int4(group_size=7)` that cannot be read or validated."""


class Refusal(OptimizationError):
    """The technique cannot help or cannot run on this model; the reason is the message."""


class IncompatibleOptimizations(OptimizationError):
    """Two techniques of one composition that cannot work together; both are named."""


class NativeModuleMissing(OptimizationError):
    """The compiled kernels were not found; says what was looked for and how to build them."""
