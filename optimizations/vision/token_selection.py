"""Which visual tokens to keep: criteria on the merged features alone, no attention weights needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

# A token whose residual energy falls below this share of the largest norm is a duplicate of kept ones.
DUPLICATE_ENERGY = 1e-6


def volume(features: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy maximum-volume subset: MAP inference of a DPP with a linear kernel (Chen et al., NeurIPS 2018).

    Each step keeps the token with the largest component outside the span of those kept, so a duplicate has
    nothing left to offer and goes first. Incremental Cholesky: O(n·count) per step after one n × n Gram matrix.

    Args:
        features: [n, width], any floating type.
        count: tokens to keep, 1 <= count <= n.

    Returns:
        Indices of the kept tokens, int64 [count], ascending.
    """
    gram = _gram(features)
    residual = gram.diagonal().copy()
    floor = residual.max() * DUPLICATE_ENERGY
    factor = np.zeros((count, len(gram)), dtype=gram.dtype)
    chosen: list[int] = []
    for step in range(count):
        pivot = int(residual.argmax())
        if residual[pivot] <= floor:  # everything left lies in the span: only duplicates remain
            return _filled(chosen, count, len(gram), features.device)
        row = gram[pivot] - factor[:step, pivot] @ factor[:step]
        factor[step] = row / np.sqrt(residual[pivot])
        residual -= np.square(factor[step])
        chosen.append(pivot)
        residual[pivot] = -np.inf
    return torch.tensor(sorted(chosen), device=features.device)


def farthest(features: torch.Tensor, count: int) -> torch.Tensor:
    """Farthest-point (k-center greedy) subset by Euclidean distance (Gonzalez, 1985); shapes as `volume`."""
    gram = _gram(features)
    energy = gram.diagonal()
    pivot = int((energy - 2 * gram.mean(0)).argmax())  # farthest from the mean
    distance = np.full(len(gram), np.inf, dtype=gram.dtype)
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(pivot)
        np.minimum(distance, energy + energy[pivot] - 2 * gram[pivot], out=distance)
        distance[pivot] = -np.inf
        pivot = int(distance.argmax())
    return torch.tensor(sorted(chosen), device=features.device)


def uniform(features: torch.Tensor, count: int) -> torch.Tensor:
    """Evenly spaced tokens: the control that a criterion has to beat (arXiv 2502.11501); shapes as `volume`."""
    return _spread(torch.arange(len(features), device=features.device), count)


METHODS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "volume": volume,
    "farthest": farthest,
    "uniform": uniform,
}


def _gram(features: torch.Tensor) -> np.ndarray:
    """Inner products of all tokens, float32 [n, n], in NumPy: the greedy loops run many tiny operations, each
    several times faster there than in torch."""
    wide = features.float()
    return (wide @ wide.T).cpu().numpy()


def _filled(chosen: list[int], count: int, total: int, device: torch.device) -> torch.Tensor:
    """`chosen` and, evenly spaced, as many of the rest as are missing to `count`."""
    rest = torch.tensor(sorted(set(range(total)) - set(chosen)), device=device)
    extra = _spread(rest, count - len(chosen))
    return torch.cat([torch.tensor(chosen, dtype=torch.int64, device=device), extra]).sort().values


def _spread(indices: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of `indices` at even distances."""
    steps = (torch.arange(count, device=indices.device) * 2 + 1) * len(indices) // (2 * count)
    return indices[steps]
