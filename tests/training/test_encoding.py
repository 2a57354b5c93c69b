"""Nested state comes back from JSON data and tensors as it was, types and bits included."""

import json
from collections import Counter, OrderedDict, deque

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.training.encoding import decode, difference, encode

atoms = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
keys = st.one_of(st.integers(), st.text(), st.tuples(st.integers(), st.text()), st.booleans(), st.none())
nested = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(keys, inner),
        st.dictionaries(keys, st.integers()).map(Counter),
        st.dictionaries(keys, inner).map(OrderedDict),
        st.lists(atoms).map(deque),
        st.frozensets(keys),
        st.builds(lambda size: torch.arange(size) / 3, st.integers(0, 4)),
    ),
)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return (
            type(one) is type(other) and one.keys() == other.keys() and all(equal(v, other[k]) for k, v in one.items())
        )
    if isinstance(one, (list, tuple, deque)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@settings(max_examples=200, deadline=None)
@given(nested)
def test_what_is_encoded_comes_back(value):
    tensors = {}
    encoded = encode(value, "value", tensors)
    back = decode(json.loads(json.dumps(encoded)), tensors)
    assert equal(value, back)
    others = {}
    assert difference(encoded, encode(back, "value", others), tensors, others) is None
