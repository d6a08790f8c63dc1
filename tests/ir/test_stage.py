"""Stages other than convolutions: their numbers, and those of chains."""

from __future__ import annotations

from sepc.ir.convolution import Convolution
from sepc.ir.stage import Chain, Map, Normalization, Pooling


def test_numbers_of_the_other_stages() -> None:
    assert Pooling(2, 6, 6, 3, 3, 8, True, kernel=(2, 3)).flops == 2 * 8 * 9 * 6
    assert Pooling(2, 7, 6, 3, 3, 8, False, adaptive=True).window == (3, 2)
    assert Normalization((1, 2, 5, 8), 1e-5).flops == 640
    assert Map((2, 3, 4), 5).flops == 120


def test_a_chain_computes_the_rows_that_its_last_link_needs_and_keeps_them_in_rings() -> None:
    expand = Convolution(1, 8, 8, 8, 8, 4, 16)
    strided = Convolution(1, 8, 8, 4, 4, 16, 16, 16, (3, 3), (2, 2), (1, 1))
    project = Convolution(1, 4, 4, 4, 4, 16, 8)
    chain = Chain((expand, strided, project))
    assert chain.rows_for(1) == (3, 1, 1)
    assert chain.rows_for(2) == (5, 2, 2)
    assert chain.rows_for(4) == (8, 4, 4)  # Nine would be needed, were there no padding; there are eight.
    assert chain.ring_elements(2) == (5 * 8 * 16, 2 * 4 * 16)
    assert chain.ring_bytes(2) == 4 * (5 * 8 * 16 + 2 * 4 * 16)
    assert chain.flops == expand.flops + strided.flops + project.flops
