"""Dataclasses as JSON and back."""

from __future__ import annotations

import json
import math
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from sepc.errors import ArtifactError
from sepc.runtime.encoding import Decoder, Encoder, plain_json, plain_value, spec_text
from sepc.runtime.host_graph import HostGraph, HostOp
from sepc.runtime.program import HostCall, KernelCall, Pointer, Program, Storage, TensorReference
from sepc.runtime.records import Value
from sepc.runtime.signature import Constant, Results, Signature
from sepc.target import Target

REFERENCE = TensorReference(0, 3, (2, 4), (4, 1), torch.float32)


def through_json(kind: Any, value: Any) -> Any:
    encoder = Encoder()
    text = json.dumps(encoder.encode(value))
    return Decoder(bytes(encoder.tensors)).decode(kind, json.loads(text))


def test_a_program_comes_back_as_it_was() -> None:
    op = HostOp(torch.ops.aten.topk.default, (Value(0), 2), {"largest": False})
    graph = HostGraph(1, (), (op,), [Value(1)])
    program = Program(
        steps=[[KernelCall("a", (Pointer(0, 64),), 0)], HostCall(graph, (REFERENCE,), (REFERENCE,), (0, 1), 1)],
        arena_bytes=640,
        inputs=[Storage(8, torch.int64)],
        results=[REFERENCE],
        calls={"region_0": (0, 1), "region_1": (1, 2)},
        symbols={"region_0": ("a",), "region_1": ()},
        number_of_calls=2,
    )
    assert through_json(Program, program) == program


@pytest.mark.parametrize("name", ["native", "x86-64-v4", "x86:sapphirerapids"])
def test_a_target_comes_back_as_it_was(name: str) -> None:
    target = Target.parse(name)
    assert through_json(Target, target) == target


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(4, 3).mT,
        torch.tensor(True),
        torch.arange(5),
        torch.empty(0, 2),
        torch.ones(1).expand(3),
        torch.randn(2, dtype=torch.complex64),
    ],
)
def test_tensors_come_back_with_shape_type_and_values(tensor: torch.Tensor) -> None:
    graph = through_json(HostGraph, HostGraph(0, (torch.ones(3), tensor), (), ()))
    assert graph.constants[1].dtype == tensor.dtype
    assert torch.equal(graph.constants[1], tensor)


@pytest.mark.parametrize(
    "change",
    [{"offset": 1 << 40}, {"offset": -4}, {"shape": [100]}, {"shape": [-1]}, {"dtype": "load"}, {"dtype": "nonsense"}],
)
def test_a_tensor_outside_of_its_bytes_is_refused(change: dict[str, Any]) -> None:
    encoder = Encoder()
    encoded = encoder.encode(torch.ones(3)) | change
    with pytest.raises(ValueError, match=r"not inside|there is no dtype"):
        Decoder(bytes(encoder.tensors)).decode(torch.Tensor, encoded)


numbers = st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
scalars = st.none() | st.booleans() | numbers | st.text()
plain = st.recursive(scalars, lambda inner: st.lists(inner) | st.lists(inner).map(tuple))


@given(plain)
def test_plain_values_come_back_with_their_types(value: Any) -> None:
    found = plain_value(json.loads(json.dumps(plain_json(value))))
    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize(
    "value",
    [torch.float16, torch.strided, torch.channels_last, torch.device("cpu"), Value(3), [Value(1), (None, [2.0])]],
)
def test_what_operators_take_comes_back(value: object) -> None:
    assert plain_value(json.loads(json.dumps(plain_json(value)))) == value


def test_not_a_number_comes_back() -> None:
    found = plain_value(plain_json(math.nan))
    assert isinstance(found, float)
    assert math.isnan(found)


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, print, torch.Generator(), namedtuple("Pair", "a b")(1, 2), torch.ones(1)]
)
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ArtifactError, match="cannot be saved"):
        plain_json(value)


@pytest.mark.parametrize(
    "value", [{"float": 1}, {"dtype": "save"}, {"a": 1}, {"list": {}}, {}, {"tuple": [], "list": []}, [1]]
)
def test_a_plain_value_that_nobody_wrote_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        plain_value(value)


STRUCTURES = [
    (1, [2, {"a": 3}], None),
    OrderedDict(out=1, aux=[2]),
    defaultdict(list, {"a": 1}),
    {1: 2, "b": ()},
    torch.ones(2).topk(1),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: type(structure).__name__)
def test_structures_come_back(structure: Any) -> None:
    spec = pytree.tree_structure(structure)
    assert through_json(Results, Results(spec, (Constant(1.0), 0))) == Results(spec, (Constant(1.0), 0))


def test_a_structure_of_an_unknown_type_cannot_be_saved() -> None:
    pair = namedtuple("Pair", "a b")
    with pytest.raises(ArtifactError, match="structure"):
        spec_text(pytree.tree_structure(pair(1, 2)))


def test_a_structure_cannot_have_modules_imported() -> None:
    text = spec_text(pytree.tree_structure(defaultdict(list, {"a": 1})))
    assert "builtins" in text
    results = {"leaves": [0], "spec": text.replace("builtins", "antigravity", 2)}
    with pytest.raises(ValueError, match="may not name a module"):
        Decoder().decode(Results, results)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Pointer, {"block": 0}),
        (Pointer, {"block": 0, "offset_bytes": "1"}),
        (Pointer, {"block": True, "offset_bytes": 1}),
        (Pointer, {"block": 0, "offset_bytes": 1, "more": 1}),
        (Pointer, [0, 1]),
        (Signature, {"spec": "[]", "leaves": []}),
        (Storage, {"elements": 1, "dtype": 7}),
        (Program, {}),
        (Results, {"spec": "[1, {}]", "leaves": []}),
    ],
)
def test_what_has_not_the_declared_types_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        Decoder().decode(kind, value)


def test_the_type_that_a_target_computes_in_comes_back() -> None:
    target = Target.parse("arm64:cortex-a76").computing_in("float16")
    assert through_json(Target, target) == target
