import pytest
import torch

from quantflow.upstream import pytree

TREES = [1, (1, 2), [1, {"b": 2, "a": (3, None)}], {"x": [], "y": ()}]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_flatten_and_back(tree):
    leaves, spec = pytree.tree_flatten(tree)
    assert pytree.tree_unflatten(leaves, spec) == tree
    assert leaves == pytree.tree_leaves(tree)
    assert spec == pytree.tree_structure(tree)
    assert isinstance(spec, pytree.TreeSpec)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_a_spec_is_text(tree):
    spec = pytree.tree_structure(tree)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


def test_dicts_keep_their_order():
    assert pytree.tree_leaves({"b": 1, "a": 2}) == [1, 2]


def test_none_is_a_leaf():
    assert pytree.tree_leaves((None, 1)) == [None, 1]


def test_map():
    assert pytree.tree_map(lambda x: x + 1, (1, [2])) == (2, [3])
    assert pytree.tree_map_only(int, lambda x: x + 1, (1, ["2"])) == (2, ["2"])


def test_paths():
    (((path), leaf),), _ = pytree.tree_flatten_with_path({"a": [5]})
    assert "".join(map(str, path)) == "['a'][0]"
    assert leaf == 5


def test_an_exported_program_is_described_by_these_specs():
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    assert isinstance(program.call_spec.in_spec, pytree.TreeSpec)
