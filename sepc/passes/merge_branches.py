"""merge-branches: parallel linear branches of one input become one convolution.

Pattern: a sum with several branches of the same x (`sepc.passes.branches`): convolutions of x and x itself, each with
scales and shifts behind it, such as a batch norm. The convolution with the most weights is the host, and takes in every
branch whose taps are among its own. In float64,

    Σ (Wₙ∗x + bₙ)  =  (Σ embed(Wₙ))∗x + Σ bₙ

`embed` moves tap i of a branch, which reads at distance d·i - p from the output's place, to that tap j of the host
which reads there too, D·j - P = d·i - p, in every dimension, with zeros between. Input channels move likewise: a branch
with more groups than the host lies on the diagonal of its blocks.

Preconditions, per branch: the stride is the host's, each tap is one of the host's, and each group lies in one of the
host's. So extents and groups of the host stay, and the sum takes no more operations than the host alone did. Whatever
is not linear in x, or does not fit, stays in the sum. Branches may contain a batch norm, so this comes before folding.

    batch_norm(conv3x3(x)) + conv1x1(x) + x        becomes    conv3x3'(x)
    conv3x3(x) + conv1x3(x) + conv3x1(x) - y       becomes    conv3x3'(x) - y
    conv1x3(x) + conv3x1(x)                        stays, as a kernel of 3x3 has more taps than both
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from sepc.ir.ops import aten
from sepc.ir.types import fake_mode
from sepc.passes.branches import Branch, Term, is_inner, is_sum, read_branch, read_terms, terms_by_input
from sepc.passes.fold_batch_norm import build_layer
from sepc.passes.manager import PassContext
from sepc.passes.rewriter import Rejection, Rewriter, replace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx


@dataclass(frozen=True)
class MergeBranches:
    """The pass. Sums are visited in order, so that what one has become can be a branch of the next."""

    name: ClassVar[str] = "merge-branches"

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> bool:
        """Merge the branches of every sum of `graph_module`; returns whether it changed."""
        changed, mode = False, fake_mode(graph_module)
        for node in list(graph_module.graph.nodes):
            if is_sum(node) and not is_inner(node):
                changed |= self._merge(Rewriter(graph_module, self.name, mode, node, (node,)), context)
        return changed

    def _merge(self, build: Rewriter, context: PassContext) -> bool:
        terms = read_terms(build.anchor, build.graph_module)
        teams: list[list[Branch]] = []
        for source, linear in terms_by_input(terms).items():
            if len(linear) > 1:
                teams += self._teams(self._branches(source, linear, build, context), context)
        if not teams:
            return False
        merged = {branch.term.node: None for team in teams for branch in team}
        build.origins = (*merged, build.anchor)
        rest = [term for term in terms if term.node not in merged]
        rejection = replace(build.anchor, build, lambda: build_sum(teams, rest, build))
        for team in () if rejection else teams:
            message = f"{len(team)} branches → one convolution"
            context.note(self.name, [branch.term.node for branch in team], message, taken=True)
        if rejection is not None:
            context.note(self.name, build.anchor, rejection.reason)
        return rejection is None

    def _branches(self, source: fx.Node, terms: list[Term], build: Rewriter, context: PassContext) -> list[Branch]:
        branches: list[Branch] = []
        for term in terms:
            branch = read_branch(term, source, build.graph_module)
            if isinstance(branch, Rejection):
                context.note(self.name, term.node, branch.reason)
            else:
                branches.append(branch)
        return branches

    def _teams(self, branches: list[Branch], context: PassContext) -> Iterator[list[Branch]]:
        """Branches that merge, the host first. What does not fit the largest host may fit the next."""
        while hosts := [branch for branch in branches if branch.layer is not None]:
            host = max(hosts, key=lambda branch: branch.weight.numel())
            team, others = [host], list[Branch]()
            for branch in branches:
                reason = misfit(branch, host)
                if reason:
                    context.note(self.name, branch.term.node, reason)
                    others.append(branch)
                elif branch is not host:
                    team.append(branch)
            if len(team) > 1:
                yield team
            branches = others


def misfit(branch: Branch, host: Branch) -> str:
    """Why the weights of `branch` cannot be among those of `host`; empty if they can."""
    name = host.term.chain.input.name
    if branch.stride != host.stride:
        return f"its stride {list(branch.stride)} is not {list(host.stride)}, that of {name}"
    if branch.groups % host.groups:
        return f"its groups, {branch.groups}, do not lie in those of {name}, {host.groups}"
    for dim, size in enumerate(host.kernel):
        if any(tap % 1 or not 0 <= tap < size for tap in taps(branch, host, dim)):
            return f"its kernel of {'x'.join(map(str, branch.kernel))} has taps that {name} has not"
    return ""


def taps(branch: Branch, host: Branch, dim: int) -> list[float]:
    """The places in the kernel of `host` that read what the taps of `branch` read, along spatial dimension `dim`."""
    first = host.padding[dim] - branch.padding[dim]
    return [(first + branch.dilation[dim] * tap) / host.dilation[dim] for tap in range(branch.kernel[dim])]


def embed(branch: Branch, host: Branch) -> torch.Tensor:
    """The weights of `branch` in the shape of those of `host`, with zeros around them."""
    weight = branch.weight
    for dim, size in enumerate(host.kernel):
        places = torch.tensor(taps(branch, host, dim)).long()
        wider = weight.new_zeros(*weight.shape[: dim + 2], size, *weight.shape[dim + 3 :])
        weight = wider.index_copy(dim + 2, places, weight)
    outputs, inputs = torch.arange(weight.shape[0]), torch.arange(weight.shape[1])
    # The first input channel that each output channel reads, in the branch and in the host.
    inner, outer = (outputs * one.groups // len(outputs) * one.weight.shape[1] for one in (branch, host))
    result = torch.zeros_like(host.weight)
    result[outputs[:, None], (inner - outer)[:, None] + inputs] = weight
    return result


def build_sum(teams: list[list[Branch]], rest: list[Term], build: Rewriter) -> fx.Node:
    """The sum of a convolution per team and of the other terms."""
    result: fx.Node | None = None
    for team in teams:
        host = team[0]
        # Begins with the host's own, as the strides of the weights decide on those of the result.
        weight, bias = host.weight.clone(), host.bias
        for branch in team[1:]:
            weight += embed(branch, host)
            bias = bias + branch.bias
        assert host.layer is not None, "only convolutions are hosts"
        convolution = build_layer(build, host.layer, host.layer.input, weight, bias)
        result = convolution if result is None else build.call(aten.add.Tensor, result, convolution)
    assert result is not None, "there is a team"
    for term in rest:
        alpha = {} if term.factor == 1 else {"alpha": term.factor}
        result = build.call(aten.add.Tensor, result, term.node, **alpha)
    return result
