"""How calls are described: leaves, structures, keys."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from sepc.runtime.signature import Constant, Results, TensorCall, dense, flatten


def test_plain_tensors_are_flattened_as_pytorch_flattens_them() -> None:
    tensors = (torch.zeros(2), torch.zeros(3))
    for args in ((), tensors[:1], tensors):
        leaves, spec = flatten(args, {})
        expected_leaves, expected_spec = pytree.tree_flatten((args, {}))
        assert [id(leaf) for leaf in leaves] == [id(leaf) for leaf in expected_leaves]
        assert spec == expected_spec
        assert hash(spec) == hash(expected_spec)


def test_the_order_of_keywords_does_not_matter() -> None:
    one, two = torch.zeros(2), torch.zeros(3)
    leaves, spec = flatten((one,), {"b": two, "a": 1})
    others, same = flatten((one,), {"a": 1, "b": two})
    assert list(map(id, leaves)) == list(map(id, others))
    assert spec == same


def test_results_get_their_structure_back() -> None:
    y = torch.zeros(2)
    for result in (y, (y,), {"y": [y, 3]}):
        leaves, spec = pytree.tree_flatten(result)
        places = tuple(0 if isinstance(leaf, torch.Tensor) else Constant(leaf) for leaf in leaves)
        again, structure = pytree.tree_flatten(Results(spec, places).unflatten([y]))
        assert structure == spec
        assert list(map(id, again)) == list(map(id, leaves))


def test_what_is_dense_in_either_order_of_channels_stays_where_it_is() -> None:
    for shape in ((2, 3, 5), (2, 3, 5, 4), (2, 3, 5, 4, 6)):
        contiguous = torch.zeros(shape)
        last = contiguous.movedim(1, -1).contiguous().movedim(-1, 1)
        assert dense(contiguous) is contiguous
        assert dense(last) is last
        copied = dense(contiguous.transpose(0, -1))
        assert copied.is_contiguous()


X = torch.zeros(2, 3, 4, 5)
USUAL = TensorCall.of(2, (X,), [X])


def test_a_call_of_a_tensor_like_the_last_one_is_the_usual_call() -> None:
    assert USUAL is not None
    assert USUAL.fits(2, (torch.ones(2, 3, 4, 5),))
    # A view at an offset has the same strides.
    assert USUAL.fits(2, (torch.zeros(3, 3, 4, 5)[1:],))


@pytest.mark.parametrize(
    "args",
    [
        (),
        (X, X),
        (1,),
        (X[:1],),
        (X.double(),),
        (X.to(memory_format=torch.channels_last),),
        (X.clone().requires_grad_(),),
        (torch.complex(X, X).conj().imag,),
        (X.to_sparse(),),
        (X.to("meta"),),
        (torch.nn.Parameter(X),),
    ],
    ids=["none", "two", "int", "shape", "type", "strides", "gradient", "negated", "sparse", "device", "subclass"],
)
def test_any_other_call_is_not_the_usual_one(args: tuple[object, ...]) -> None:
    assert USUAL is not None
    assert not USUAL.fits(2, args)
    assert USUAL.fits(2, (X,))
    assert not USUAL.fits(1, (X,))


def test_a_call_whose_arguments_are_copied_or_nested_is_never_the_usual_one() -> None:
    assert TensorCall.of(1, (), []) is None
    assert TensorCall.of(1, ([X],), [X]) is None
    assert TensorCall.of(1, (X.mT,), [dense(X.mT)]) is None
    z = torch.complex(X, X)
    assert TensorCall.of(1, (z,), [z]) is None
