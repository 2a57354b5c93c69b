import pytest
import torch
from executorch.exir import pass_base
from torch import fx
from torch._export import pass_base as torch_pass_base

from quantflow.upstream.edge_operators import ops
from quantflow.upstream.lowering import pass_effects

CHANGES, RENAMES = pass_effects.changes(), pass_effects.renames()
BASES = pass_base.ExportPass, torch_pass_base._ExportPassBaseDeprecatedDoNotUse


@pytest.mark.parametrize("kind", [*CHANGES, *RENAMES], ids=lambda kind: kind.__name__)
def test_each_pass_overrides_nothing_but_call_operator(kind):
    base = next(base for base in BASES if issubclass(kind, base))
    overridden = {hook for hook in pass_effects.HOOKS if getattr(kind, hook, None) is not getattr(base, hook, None)}
    assert overridden == {"call_operator"}


@pytest.mark.parametrize("base", BASES, ids=lambda kind: kind.__name__)
def test_no_other_method_of_the_base_class_changes_nodes(base):
    """A new ``call_`` method is a new way in which a pass may change a node. Passes themselves call the methods for sizes."""
    methods = {name for kind in base.__mro__ for name in vars(kind) if name.startswith("call_")}
    methods -= {"call_size_operator", "call_size_operator_all"}
    assert methods <= set(pass_effects.HOOKS) | {
        "call_function",
        "call_method",
        "call_module",
        "call_triton_kernel_wrapper",
    }


def node(target, *args):
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"), *args))


def named(table, name):
    return next(function for kind, function in table.items() if kind.__name__ == name)


def test_which_nodes_are_changed():
    aten = torch.ops.aten
    numbers = named(CHANGES, "ScalarToTensorPass")
    assert numbers(node(ops.edge.aten.add.Tensor, 1.0))
    assert not numbers(node(ops.edge.aten.leaky_relu.default, 1.0))
    assert named(CHANGES, "NormalizeTransposePass")(node(aten.t.default))
    assert named(CHANGES, "ReplaceBrokenOpsWithFunctionalOpsPass")(node(aten.view.default, [1]))
    assert not named(CHANGES, "ReplaceBrokenOpsWithFunctionalOpsPass")(node(aten.relu.default))
    assert named(CHANGES, "MemoryFormatOpsPass")(node(ops.edge.aten._to_copy.default))
    assert named(CHANGES, "LegalizePortableDimOrderPass")(node(ops.edge.aten.avg_pool2d.default, [1]))


def test_which_operators_are_renamed():
    aten = torch.ops.aten
    edge, views = named(RENAMES, "OpReplacePass"), named(RENAMES, "ReplaceViewOpsWithViewCopyOpsPass")
    assert edge(aten.add.Tensor) == ops.edge.aten.add.Tensor
    assert views(aten.view.default) == aten.view_copy.default
    assert views(aten.relu.default) == aten.relu.default
    assert views(torch.add) == torch.add
