"""Whole numbers: rounding up, and channels as vectors."""

from __future__ import annotations


def ceil_div(numerator: int, denominator: int) -> int:
    """`numerator / denominator`, rounded up."""
    return -(-numerator // denominator)


def split_lanes(channels: int, lanes: int) -> tuple[int, ...]:
    """Vector widths that cover `channels` exactly: as many full vectors as fit, then decreasing powers of two."""
    widths = [lanes] * (channels // lanes)
    rest, width = channels % lanes, lanes // 2
    while rest:
        if rest >= width:
            widths.append(width)
            rest -= width
        width //= 2
    return tuple(widths)
