"""The second network computes what the model with its layers replaced does, and each value once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sepc.ir.region import results
from sepc.separable.layers import find_layers
from sepc.separable.twins import Twins
from tests.separable.networks import graph_of, network, smooth_images


def test_both_networks_compute_what_they_stand_for() -> None:
    model, batches = network(), [smooth_images(4) for _ in range(2)]
    graph_module = graph_of(model, batches[0])
    layers, _ = find_layers(model, graph_module)
    twins, rewritten = Twins(graph_module, batches), copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers:
            twins.forget()
            assert len(twins.second(layer.conv.input)) == 2
            if layer.skip is not None:
                twins.second(layer.skip)  # Computed before it is replaced, and so again after.
            other = nn.Conv2d(*layer.node.args[1].meta["val"].shape[1::-1], 3, layer.conv.stride, 1)
            parent, _, name = layer.path.rpartition(".")
            setattr(rewritten.get_submodule(parent), name, other)
            twins.replace(layer.node, other)
        (result,) = results(graph_module)
        for index, batch in enumerate(batches):
            torch.testing.assert_close(twins.first(result)[index], model(batch))
            torch.testing.assert_close(twins.second(result)[index], rewritten(batch))


def test_before_the_first_replacement_values_are_shared() -> None:
    model, batch = network(), smooth_images(4)
    graph_module = graph_of(model, batch)
    layers, _ = find_layers(model, graph_module)
    twins = Twins(graph_module, [batch])
    assert twins.first(layers[3].node)[0] is twins.second(layers[3].node)[0]
    twins.replace(layers[2].node, nn.Conv2d(16, 16, 3, padding=1))
    assert twins.first(layers[3].node)[0] is twins.second(layers[3].node)[0]
    assert twins.first(layers[4].node)[0] is not twins.second(layers[4].node)[0]


def test_each_node_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = network(), smooth_images(4)
    graph_module = graph_of(model, batch)
    calls: list[str] = []
    run = Twins._run
    monkeypatch.setattr(Twins, "_run", lambda self, node: calls.append(node.name) or run(self, node))
    layers, _ = find_layers(model, graph_module)
    twins = Twins(graph_module, [batch])
    for layer in layers:
        twins.forget()
        twins.second(layer.conv.input)
        twins.first(layer.result)
    assert len(calls) == len(set(calls))
