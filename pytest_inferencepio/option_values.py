"""Reading the values of options: numbers, durations, pairs; ValueError in words for what cannot be read."""

from __future__ import annotations

import re


def parse_seed(text: str) -> int:
    """A whole number from 0 to 2^63 - 1."""
    if not re.fullmatch(r"\d+", text) or int(text) >= 2**63:
        raise ValueError(f"{text!r} is not a seed; write a whole number from 0 on")
    return int(text)


def parse_duration(text: str) -> float:
    """Seconds of `90`, `90s`, `12m` or `1.5h`; more than none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise ValueError(f"{text!r} is not a duration; write seconds, or 90s, 12m, 1h")
    return seconds


def parse_checkpoint(text: str) -> tuple[str, str]:
    """`NAME=DIR_OR_HUB_ID` as a pair; the name is resolved later, so aliases work."""
    name, _, place = text.partition("=")
    if not name.strip() or not place.strip():
        raise ValueError(f"{text!r} is not a checkpoint; write NAME=DIR_OR_HUB_ID")
    return name.strip(), place.strip()
