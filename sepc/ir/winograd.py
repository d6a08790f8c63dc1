"""The matrices of Winograd's algorithm for 3×3 convolutions, as plain numbers.

For a tile d of n×n inputs (n = m + 2), a filter g of 3×3 and m×m results Y, with ⊙ elementwise:

    Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A            A [n, m], G [n, 3], B [n, n]

They come from the Chinese remainder theorem for polynomials that are known at n − 1 points and at infinity (Toom and
Cook; Blahut, Fast Algorithms for Signal Processing, chapter 5). With points 0, 1 and −1 the error of a convolution is
that of the plain sums or less, as there are fewer of them; with 2 and −1/2 besides it is about three times as large
(64 to 256 channels of positive inputs, random filters; with ±2 or ±1/2 six to ten times).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sepc.ir.convolution import WINOGRAD_TAPS

Matrix = NDArray[np.float64]

POINTS: Final = {2: (0.0, 1.0, -1.0), 4: (0.0, 1.0, -1.0, 2.0, -0.5)}
"""By rows and columns of results in a tile."""


class Transforms(NamedTuple):
    """The matrices for tiles of m×m results: `inputs` is Bᵀ [n, n], `filters` is G [n, 3], `outputs` is Aᵀ [m, n]."""

    inputs: Matrix
    filters: Matrix
    outputs: Matrix


@lru_cache
def transforms(outputs: int) -> Transforms:
    """The matrices for tiles of `outputs`×`outputs` results."""
    points = np.array(POINTS[outputs])
    others = [np.delete(points, index) for index in range(len(points))]
    scales = np.array([np.prod(point - rest) for point, rest in zip(points, others, strict=True)])

    def powers(count: int) -> Matrix:
        """The powers below `count` of each point; of infinity, only the highest is not 0."""
        return np.vstack([np.vander(points, count, increasing=True), np.eye(count)[-1:]])

    # Rows: the polynomials with all other points as roots, lowest coefficient first; with all points for infinity.
    rows = [np.append(np.poly(rest)[::-1], 0.0) for rest in others] + [np.poly(points)[::-1]]
    return Transforms(np.array(rows), powers(WINOGRAD_TAPS) / np.append(scales, 1.0)[:, None], powers(outputs).T)


def operations(matrix: Matrix) -> int:
    """Additions and multiply-adds of M T Mᵀ for a square tile T: each row of M combines columns, then rows."""
    of_a_column = int(np.count_nonzero(matrix)) - len(matrix)
    return of_a_column * sum(map(int, matrix.shape))
