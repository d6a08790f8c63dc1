"""The matrices of Winograd's algorithm."""

from __future__ import annotations

import numpy as np
import pytest

from sepc.ir.winograd import POINTS, operations, transforms


@pytest.mark.parametrize("outputs", POINTS)
def test_a_tile_is_convolved_exactly(outputs: int) -> None:
    inputs, filters, results = transforms(outputs)
    generator = np.random.default_rng(outputs)
    tile, kernel = generator.standard_normal((outputs + 2, outputs + 2)), generator.standard_normal((3, 3))
    found = results @ ((filters @ kernel @ filters.T) * (inputs @ tile @ inputs.T)) @ results.T
    windows = np.lib.stride_tricks.sliding_window_view(tile, (3, 3))
    np.testing.assert_allclose(found, np.einsum("ijrc,rc->ij", windows, kernel), rtol=1e-12, atol=1e-12)


def test_tiles_of_2x2_results_take_the_32_and_24_additions_of_the_literature() -> None:
    inputs, _, results = transforms(2)
    assert (operations(inputs), operations(results)) == (32, 24)
    assert set(np.unique(np.abs(inputs))) == set(np.unique(np.abs(results))) == {0.0, 1.0}
