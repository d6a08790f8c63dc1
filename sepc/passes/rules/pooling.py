"""Averages over all pixels, however they are written.

Pattern and equation. For x of shape [N, C, W], [N, C, H, W] or [N, C, D, H, W],

    adaptive_avg_pool(x, 1), avg_pool(x, kernel = H × W), mean(x, [-1, -2])
        →    mean(x, [2, 3], keepdim=True), then a view to the shape it had

Preconditions. The window covers the whole image without padding, and the divisor is its size.
"""

from __future__ import annotations

from torch import fx

from sepc.ir.layers import Pool
from sepc.ir.ops import Mean, arguments, aten, shape
from sepc.passes.rewriter import Rejection, Rewriter, Rule

Window = tuple[fx.Node, tuple[int, ...], tuple[int, ...]]


class GlobalMean(Rule[Window]):
    """Average over all spatial dimensions: ``mean(x, [2, 3], keepdim=True)``, then a view to the shape it had."""

    targets = (*Pool.targets, *Mean.targets)

    def match(self, node: fx.Node, module: fx.GraphModule) -> Window | Rejection | None:
        source = Mean.of(node).input if Mean.matches(node) else Pool.of(node).input
        spatial = tuple(range(2, len(shape(source))))
        covers = self._mean_covers(node, spatial) if Mean.matches(node) else self._pool_covers(node, spatial)
        return (source, spatial, shape(node)) if covers else None

    def _mean_covers(self, node: fx.Node, spatial: tuple[int, ...]) -> bool:
        mean, named = Mean.of(node), arguments(node)
        canonical = mean.keepdim and tuple(named["dim"]) == spatial
        return len(spatial) in (1, 2, 3) and mean.dims == spatial and named["dtype"] is None and not canonical

    def _pool_covers(self, node: fx.Node, spatial: tuple[int, ...]) -> bool:
        pool, sizes = Pool.of(node), shape(Pool.of(node).input)[2:]
        if pool.kind == "max" or len(sizes) != len(pool.output_size or pool.kernel):
            return False
        if pool.kind == "adaptive_avg":
            return all(size == 1 for size in pool.output_size)
        return pool.kernel == sizes and not any(pool.padding) and pool.divisor_override is None

    def rewrite(self, match: Window, build: Rewriter) -> fx.Node:
        source, spatial, result = match
        mean = build.call(aten.mean.dim, source, list(spatial), True)
        return mean if shape(mean) == result else build.call(aten.view.default, mean, list(result))
