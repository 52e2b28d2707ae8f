"""Find the cut points of timesteps that are most alike inside their clusters, exactly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moediff.errors import DataError, OptionError

Matrix = npt.NDArray[np.floating[Any]]


def best_cuts(similarity: Matrix, count: int) -> tuple[tuple[int, ...], float]:
    """Return the clustering into `count` runs of cells that maximises J, and J.

    J = sum_i w_i (sum_{j,k in I_i} a_{j,k} / |I_i|^2) with w_i = |I_i| / G (DiffPruning, Supp.
    Eq. 3). It adds up over clusters, so dynamic programming over the last cut finds the optimum
    in O(count x G^2).

    Args:
        similarity: (G, G), finite.
        count: how many clusters, 1 to G.

    Returns:
        The boundaries 0 = c0 < c1 < ... < cN = G in cells; of equal optima the one whose last
        cuts come first.

    Raises:
        OptionError: `count` is outside 1 to G.
        DataError: the similarity is not a square matrix of finite numbers.
    """
    gain = _gains(similarity)
    cells = len(gain) - 1
    if not 1 <= count <= cells:
        raise OptionError(
            f"count: got {count}; allowed is 1 to {cells}, the number of cells. Ask for fewer "
            "clusters or use a finer grid."
        )
    best = gain[0]  # (G + 1,), of the clusterings of the first b cells
    origins = []
    for _ in range(count - 1):
        reached = best[:, None] + gain
        origins.append(reached.argmax(0))
        best = reached.max(0)
    cuts = [cells]
    for origin in reversed(origins):
        cuts.append(int(origin[cuts[-1]]))
    boundaries = (0, *reversed(cuts))
    return boundaries, float(best[cells])


def single_cut_objective(similarity: Matrix) -> npt.NDArray[np.float64]:
    """J (G - 1,) of two clusters, by the cell where the second one starts (Supp. Eq. 1)."""
    gain = _gains(similarity)
    curve: npt.NDArray[np.float64] = gain[0, 1:-1] + gain[1:-1, -1]
    return curve


def objective(similarity: Matrix, cuts: Sequence[int]) -> float:
    """J of given boundaries 0 = c0 < c1 < ... < cN = G (Supp. Eq. 3)."""
    gain = _gains(similarity)
    return float(sum(gain[low, high] for low, high in itertools.pairwise(cuts)))


def held_out(
    first: Matrix, second: Matrix, across: Matrix, most: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """How well one half of the samples is clustered by the other, to choose the number N.

    On the samples that the cuts were found on, J only rises with N. It hardly falls on others
    either: their matrix has a diagonal of ones and no negative eigenvalue, so that any further cut
    raises J, one through pure noise by 1 / G. The fit does fall. It says how much of one half's
    unit gradients is told by the other half's mean over their interval; b_k are those that are
    told, m_i the means:

        fit = 1 - 1/G sum_i sum_{k in I_i} |b_k - m_i|^2
            = 2 J(across) - J(the half that tells)

    Args:
        first: (G, G) cosines within the first half.
        second: (G, G) cosines within the second half.
        across: (G, G) cosines between them, the first half's by rows.
        most: the largest N, at most G.

    Returns:
        J (most,) on one half at the cuts found on the other and the fit (most,) there, by N from 1,
        both the mean of the two directions.
    """
    objectives, fits = np.empty(most), np.empty(most)
    others = (second, first)
    for count in range(1, most + 1):
        found = [(half, best_cuts(half, count)[0]) for half in (first, second)]
        objectives[count - 1] = np.mean(
            [objective(other, cuts) for other, (_, cuts) in zip(others, found, strict=True)]
        )
        fits[count - 1] = np.mean(
            [2 * objective(across, cuts) - objective(half, cuts) for half, cuts in found]
        )
    return objectives, fits


def _gains(similarity: Matrix) -> npt.NDArray[np.float64]:
    """What a cluster of the cells [a, b) adds to J, (G + 1, G + 1); -inf where it is empty."""
    matrix = np.asarray(similarity, dtype=np.float64)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not square or not np.isfinite(matrix).all():
        raise DataError(
            f"similarity: got shape {matrix.shape}; allowed is a square matrix of finite numbers."
        )
    cells = len(matrix)
    prefix = np.zeros((cells + 1, cells + 1))
    prefix[1:, 1:] = matrix.cumsum(0).cumsum(1)
    corner = prefix.diagonal()
    # block[a, b] = sum of a_{j,k} over a <= j, k < b
    block = corner[None, :] - prefix - prefix.T + corner[:, None]
    place = np.arange(cells + 1)
    length = place[None, :] - place[:, None]
    # w_i block / |I_i|^2 = block / (|I_i| G)
    return np.where(length > 0, block / (np.maximum(length, 1) * cells), -np.inf)
