"""Finding peers: modules of this package, installed entry points, and what is registered."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Sequence
from typing import Any

from pytest_inferencepio.naming import pick
from pytest_inferencepio.peers.contract import Peer

ENTRY_POINT_GROUP = "pytest_inferencepio.peers"
PACKAGE = "pytest_inferencepio.peers"

_registered: dict[str, Peer] = {}
_discovered = False


def register(peer: type[Peer]) -> type[Peer]:
    """Add a peer from outside (a conftest, an entry point). Usable as a decorator.

    Raises:
        ValueError: another class already has this name.
    """
    known = _registered.get(peer.name)
    if known is not None and type(known) is not peer:
        raise ValueError(f"two peers are named {peer.name!r}: {type(known)} and {peer}; rename one")
    _registered[peer.name] = peer()
    return peer


def unregister(name: str) -> None:
    """Forget a peer added with `register`."""
    del _registered[name]


def peers() -> dict[str, Peer]:
    """Every peer by name, in the order of names."""
    _discover()
    return dict(sorted(_registered.items()))


def choose(wanted: Sequence[str]) -> tuple[str, ...]:
    """The names of the peers that `wanted` names, `all` for every one, none for nothing.

    Raises:
        UnknownName: names the near ones and all.
    """
    return pick(wanted, tuple(peers()), "peer") if wanted else ()


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    root = importlib.import_module(PACKAGE)
    for info in pkgutil.iter_modules(root.__path__, f"{PACKAGE}."):
        if not info.ispkg:
            _register_from(importlib.import_module(info.name))
    _discovered = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        register(entry.load())


def _register_from(module: Any) -> None:
    for _, member in inspect.getmembers(module, inspect.isclass):
        if (
            issubclass(member, Peer)
            and member.__module__ == module.__name__
            and not inspect.isabstract(member)
        ):
            register(member)
