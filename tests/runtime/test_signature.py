"""How calls are described: leaves, structures, keys."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from sepc.runtime.signature import Constant, Results, dense, flatten


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
