"""Structures of inputs and outputs that a program tells of: plain ones are read, and none imports anything."""

import json
import sys

import pytest
import torch
import torch.utils._pytree as pytree

import quantflow as qf
from quantflow import pte
from quantflow.signature.pytree_safety import spec_is_plain


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        (
            "collections.defaultdict",
            {"default_factory_module": "os", "default_factory_name": "system", "dict_context": []},
        ),
        ("builtins.dict", json.dumps([{"__enum__": True, "fqn": "this:d", "name": "a"}])),
        ("builtins.dict", '[{"\\u005f_enum__": true, "fqn": "this:d", "name": "a"}]'),
    ],
)
def test_a_signature_imports_nothing(kind, context):
    hostile = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])
    text = json.dumps({"inputs": [], "in_spec": hostile, "out_spec": hostile})
    from executorch.exir import to_edge

    exported = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    program = to_edge(exported, constant_methods={pte.SIGNATURE_METHOD: text}).to_executorch()
    assert qf.Program.from_buffer(program.buffer).signature.out_spec is None
    assert "this" not in sys.modules


def test_plain_structures_are_read():
    from collections import OrderedDict, defaultdict, deque

    nested = {"a": (1, [2]), "b": OrderedDict(c=deque([3])), "d": defaultdict(list, {"e": 4})}
    text = pytree.treespec_dumps(pytree.tree_structure(nested))
    assert spec_is_plain(text)
    assert not spec_is_plain("[1]")
