"""The second network computes what the model with its layers replaced does, each value once, in bounded memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sepc.ir.region import results
from sepc.separable.layers import find_layers
from sepc.separable.twins import Pair, Twins
from tests.separable.networks import graph_of, network, smooth_images


@pytest.mark.parametrize("kept_bytes", [1 << 30, 20_000, 0])
def test_both_networks_compute_what_they_stand_for(kept_bytes: int) -> None:
    model, batches = network(), [smooth_images(4) for _ in range(2)]
    graph_module = graph_of(model, batches[0])
    layers, _ = find_layers(model, graph_module)
    twins, rewritten = Twins(graph_module, [(one,) for one in batches], kept_bytes), copy.deepcopy(model)
    assert twins.images == 8
    with torch.no_grad():
        for layer in layers:
            for pair in twins:
                pair.second(layer.conv.input)
                if layer.skip is not None:
                    pair.second(layer.skip)  # Computed before it is replaced, and so again after.
            other = nn.Conv2d(*layer.node.args[1].meta["val"].shape[1::-1], 3, layer.conv.stride, 1)
            parent, _, name = layer.path.rpartition(".")
            setattr(rewritten.get_submodule(parent), name, other)
            twins.replace(layer.node, other)
        (result,) = results(graph_module)
        for pair, batch in zip(twins, batches, strict=True):
            torch.testing.assert_close(pair.first(result), model(batch))
            torch.testing.assert_close(pair.second(result), rewritten(batch))


def test_before_the_first_replacement_values_are_shared() -> None:
    model, batch = network(), smooth_images(4)
    graph_module = graph_of(model, batch)
    layers, _ = find_layers(model, graph_module)
    twins = Twins(graph_module, [(batch,)])
    (pair,) = twins
    assert pair.first(layers[3].node) is pair.second(layers[3].node)
    twins.replace(layers[2].node, nn.Conv2d(16, 16, 3, padding=1))
    assert pair.first(layers[3].node) is pair.second(layers[3].node)
    assert pair.first(layers[4].node) is not pair.second(layers[4].node)


def test_each_node_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = network(), smooth_images(4)
    graph_module = graph_of(model, batch)
    calls: list[str] = []
    run = Pair._run
    monkeypatch.setattr(Pair, "_run", lambda self, node: calls.append(node.name) or run(self, node))
    layers, _ = find_layers(model, graph_module)
    twins = Twins(graph_module, [(batch,)])
    for layer in layers:
        for pair in twins:
            pair.second(layer.conv.input)
            pair.first(layer.result)
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("kept_bytes", [0, 100_000, 1 << 30])
def test_no_more_is_kept_than_was_allowed(kept_bytes: int) -> None:
    model, batches = network(), [(smooth_images(4),) for _ in range(8)]
    graph_module = graph_of(model, batches[0][0])
    layers, _ = find_layers(model, graph_module)
    twins = Twins(graph_module, batches, kept_bytes)
    kept: list[int] = []
    for layer in layers:
        for pair in twins:
            pair.second(layer.conv.input)
            assert pair.kept_bytes() > 0 or layer is layers[0]
        kept.append(sum(pair.kept_bytes() for pair in twins._pairs))
        twins.replace(layer.node, nn.Conv2d(layer.conv.in_channels, layer.conv.out_channels, 3, layer.conv.stride, 1))
    assert max(kept) <= kept_bytes
    assert (max(kept) > 0) == (kept_bytes > 0)
