"""Constant folding: what follows from parameters, buffers and static shapes alone is computed once."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.graph.aten import WEIGHTED, argument, aten, op, tensor_value, value
from quantflow.graph.constants import constant_calls, constant_values, constants_before
from quantflow.graph.parameters import is_constant, read_attribute, set_tensor, tensor_of, unused_name
from quantflow.graph.rewrites.rewriting import call_before, tensor_before
from quantflow.graph.state import all_written_by, memories

# Folded values may need this much more memory than what they follow from: a share of the state's elements, in bytes, and
# at least the second number. A bias table that is read out for every pair of positions can exceed the quantized network.
_GROWTH = 0.1
_LEAST_GROWTH = 2**20


def fold_constants(module: GraphModule) -> None:
    """Replace calls that follow from constants alone by reads of their values, in place, for inference.

    Weights that a layer computes (standardised, normalised, concatenated), tables of positions, and masks of a fixed shape are
    such values. A value that is written in place is folded with its writes. Random values are not folded, and neither are
    values so large that the state would grow by more than a tenth of a byte per element. Parameters that no node reads any more
    are still there.
    """
    constants = _Constants(module)
    folded = constants.affordable()
    if not folded:
        return
    values = constant_values(module, [*folded, *constants.writes])
    for node in folded:
        _replace(module, node, values[node])
    for node in reversed(module.graph.nodes):
        if node in constants.nodes and not node.users:
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()


def _replace(module: GraphModule, node: Node, tensor: torch.Tensor) -> None:
    """Replace ``node`` by a read of ``tensor``. A caller gets a copy, so that it can't change the constant."""
    sources = {str(read.target): tensor_of(module, read) for read in constants_before([node])}
    learned = [name for name, source in sources.items() if isinstance(source, nn.Parameter)]
    if learned:
        name = unused_name(module, f"{learned[0]}_folded")
        learns = any(sources[source].requires_grad for source in learned)
        set_tensor(module, name, tensor, parameter=tensor.is_floating_point(), learns=learns)
        read = read_attribute(module, name, node, node)
    else:
        read = tensor_before(module, node, tensor)
    node.replace_all_uses_with(read)
    for user in list(read.users):
        if user.op == "output":
            user.replace_input_with(read, call_before(user, aten.clone.default, read))


def _is_weight(node: Node, user: Node) -> bool:
    return op(user) in WEIGHTED and argument(user, "weight") is node


class _Constants:
    """The calls of a graph that follow from constants alone.

    Attributes:
        nodes: The calls.
        writes: Those that write in place.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module, self.nodes = module, constant_calls(module.graph)
        self.writes = [node for node in self.nodes if all_written_by(node)]
        self._order, self._memory, self._names = memories(module.graph)

    def affordable(self) -> list[Node]:
        """Return the calls to fold: read by other nodes, and together not much larger than what they follow from. The others
        are removed from :attr:`nodes`.
        """
        state = {t.data_ptr(): t.numel() for t in (*self.module.parameters(), *self.module.buffers())}
        left = max(_LEAST_GROWTH, _GROWTH * sum(state.values()))
        found, computed = set[Node](), set[Node]()
        while ends := [node for node in self.nodes - found - computed if self._is_read(node, computed)]:
            growth = {node: self._growth(node) for node in ends}
            for node in sorted(ends, key=lambda n: (growth[n], self._order[n])):
                if growth[node] <= left:
                    left -= growth[node]
                    found.add(node)
                else:
                    computed |= self._with_writes(node)
        self.nodes -= computed
        return sorted(found - computed)

    def _is_read(self, node: Node, computed: Set[Node]) -> bool:
        """Whether ``node`` is a tensor that a node reads which is not folded. A copy of a constant for the caller stays."""
        readers = [user for user in node.users if user not in self.nodes or user in computed]
        copies = op(node) is aten.clone.default and is_constant(node.args[0])
        return value(node) is not None and any(not (copies and reader.op == "output") for reader in readers)

    def _growth(self, node: Node) -> int:
        """The bytes that the value of ``node`` takes beyond those of the constants that are then not read any more. A weight
        takes none, since it is read in any case, perhaps as integers.
        """
        if any(user.op == "call_module" or _is_weight(node, user) for user in node.users):
            return 0
        freed = (n for n in constants_before([node]) if self.nodes.issuperset(n.users))
        return max(0, tensor_value(node).nbytes - sum(tensor_of(self.module, n).nbytes for n in freed))

    def _with_writes(self, node: Node) -> set[Node]:
        """``node``, and if its memory is written in place, all nodes that read or write it."""
        memory = self._memory[node]
        names = set(self._names[memory])
        written = any(self._memory[base] is memory for write in self.writes for base in all_written_by(write))
        return names | {user for name in names for user in name.users} & self.nodes if written else {node}
