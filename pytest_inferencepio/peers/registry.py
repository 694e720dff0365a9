"""Finding peers: modules of this package, installed entry points, and what is registered."""

from __future__ import annotations

from collections.abc import Sequence

from optimizations.discovery import classes_in, installed
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
    for peer in classes_in(PACKAGE, Peer):  # type: ignore[type-abstract]
        register(peer)
    _discovered = True
    for peer in installed(ENTRY_POINT_GROUP):
        register(peer)
