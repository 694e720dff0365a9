"""Names a user may write: categories, scales, devices, types; splitting lists, finding near names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from pytest_inferencepio.errors import UnknownName

CATEGORIES = (
    "accuracy",
    "inference_speed",
    "memory_usage",
    "throughput",
    "power_efficiency",
    "optimization_impact",
)
# Run only when they are named (or, for the comparison, when peers are): the gate must not become longer. They tell of
# this machine and of other engines, so they are neither compared with a baseline nor stored in one.
EXTRA_CATEGORIES = ("hardware", "comparative")
DEVICES = ("cpu", "cuda")
DTYPES = ("bfloat16", "float16", "float32")


def split_list(text: str) -> list[str]:
    """Items of a comma list; commas inside parentheses belong to the item. Empty items are dropped."""
    items, depth, current = [], 0, ""
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth <= 0:
            items.append(current)
            current = ""
        else:
            current += character
    return [item.strip() for item in (*items, current) if item.strip()]


def pick(wanted: Sequence[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """`wanted` in the order of `known`, each once; nothing or `all` means all.

    Raises:
        UnknownName: names the near ones and all.
    """
    for name in wanted:
        if name != "all" and name not in known:
            raise UnknownName(unknown(what, name, known))
    return tuple(name for name in known if not wanted or "all" in wanted or name in wanted)


def pick_categories(wanted: Sequence[str], *, peers: bool = False) -> tuple[str, ...]:
    """The categories of a run: nothing or `all` means `CATEGORIES`; the others run when named.

    With `peers` the comparison runs besides, whatever is named.

    Raises:
        UnknownName: names the near ones and all.
    """
    known = CATEGORIES + EXTRA_CATEGORIES
    pick(wanted, known, "category")
    chosen = {*wanted, *(CATEGORIES if not wanted or "all" in wanted else ())}
    if peers:
        chosen.add("comparative")
    return tuple(name for name in known if name in chosen)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return f"unknown {what} {name!r}; {hint}known: {', '.join(known)}"
