"""Checks of settings that the weight techniques share; the messages are what a user of a specification reads."""

from __future__ import annotations

from typing import Any

from optimizations.errors import InvalidSpec
from optimizations.native.packing import GROUP_SIZES


def require_group_size(technique: str, value: Any) -> None:
    """InvalidSpec unless `value` is a group size that the kernels know."""
    if isinstance(value, bool) or value not in GROUP_SIZES:
        offered = ", ".join(map(str, GROUP_SIZES))
        raise InvalidSpec(f"{technique}: group_size must be one of {offered}, got {value!r}")


def require_flag(technique: str, setting: str, value: Any) -> None:
    """InvalidSpec unless `value` is true or false."""
    if not isinstance(value, bool):
        raise InvalidSpec(f"{technique}: {setting} must be true or false, got {value!r}")
