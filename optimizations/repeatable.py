"""For comparing answers: techniques that adapt to the clock do not while this is asked for.

How many tokens a step verifies decides how bfloat16 products are summed, and so the last bits of the logits. A technique
that chooses the number by time gives other bits every run: prompt_lookup's divergence from plain decoding moved between
1.4e-5 and 3.2e-5 nat on an unchanged tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_asked: ContextVar[bool] = ContextVar("repeatable", default=False)


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, the same inputs take the same path, however fast the machine is. Also a decorator."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def is_repeatable() -> bool:
    """Whether the clock must not decide anything now."""
    return _asked.get()
