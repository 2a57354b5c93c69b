"""Constant folding: what follows from parameters, buffers and static shapes alone is computed once."""

from __future__ import annotations

import warnings
from collections.abc import Set

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.errors import QuantflowWarning
from quantflow.graph.aten import WEIGHTED, argument, aten, label, op, tensor_value, value
from quantflow.graph.constants import constant_calls, constant_values, constants_before
from quantflow.graph.parameters import is_constant, read_attribute, set_tensor, tensor_of, unused_name
from quantflow.graph.rewrites.rewriting import call_before, tensor_before
from quantflow.graph.state import all_written_by, memories
from quantflow.upstream.operators import OpOverload

# Folded values may need this much more memory than what they follow from: a share of the state's elements, in bytes, and
# at least the second number. A bias table that is read out for every pair of positions can exceed the quantized network.
_GROWTH = 0.1
_LEAST_GROWTH = 2**20
# GraphModule.meta: the bytes by which earlier foldings let the state grow, and the constants that they counted as freed.
_SPENT = "quantflow_folded_bytes"


def fold_constants(module: GraphModule) -> None:
    """Replace calls that follow from constants alone by reads of their values, in place, for inference.

    Weights that a layer computes (standardised, normalised, concatenated), tables of positions, and masks of a fixed shape are
    such values. A value that is written in place is folded with its writes. Random values are not folded, and neither are
    values so large that the state would grow by more than a tenth of a byte per element, or of a quantized graph by more than a
    megabyte. Parameters that no node reads any more are still there.
    """
    constants = _Constants(module)
    folded = constants.affordable()
    if not folded:
        return
    try:
        values = constant_values(module, folded, constants.writes)
    except Exception as error:
        reason = (
            f"constants could not be computed in advance and are computed in each call: {type(error).__name__}: {error}"
        )
        remedy = "report it with the model; nothing else is lost"
        warnings.warn(QuantflowWarning("rewrite", reason, node=label(folded[0]), remedy=remedy), stacklevel=2)
        return
    stored = module.state_dict().keys()
    for node in folded:
        _replace(module, node, values[node], stored)
    for node in reversed(module.graph.nodes):
        if node in constants.nodes and not node.users:
            module.graph.erase_node(node)
    module.meta[_SPENT] = constants.spent, frozenset(constants.freed)
    module.graph.lint()
    module.recompile()


def _replace(module: GraphModule, node: Node, tensor: torch.Tensor, stored: Set[str]) -> None:
    """Replace ``node`` by a read of ``tensor``, which is stored with the state if what it follows from is. A caller gets a
    copy, so that it can't change the constant.
    """
    sources = {str(read.target): tensor_of(module, read) for read in constants_before([node])}
    learned = [source for source in sources.values() if isinstance(source, nn.Parameter)]
    saved = [name for name in sources if name in stored]
    if saved:
        first = next((name for name in saved if isinstance(sources[name], nn.Parameter)), saved[0])
        name = unused_name(module, f"{first}_folded")
        learns = any(source.requires_grad for source in learned)
        set_tensor(module, name, tensor, parameter=bool(learned) and tensor.is_floating_point(), learns=learns)
        read = read_attribute(module, name, node, node)
    else:
        read = tensor_before(module, node, tensor)
    node.replace_all_uses_with(read)
    for user in list(read.users):
        if user.op == "output":
            user.replace_input_with(read, call_before(user, aten.clone.default, read))


def _is_weight(node: Node, user: Node) -> bool:
    """Whether ``user`` reads ``node`` as the weight of a layer, itself or through an observer."""
    if user.op == "call_module":
        return any(_is_weight(user, reader) for reader in user.users)
    return op(user) in WEIGHTED and argument(user, "weight") is node


def _is_quantized(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "quantized_decomposed"


class _Constants:
    """The calls of a graph that follow from constants alone.

    Attributes:
        nodes: The calls.
        writes: Those that write in place.
        spent: The bytes by which folded values exceed what they follow from.
        freed: The constants that are counted as not read any more.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module, self.nodes = module, constant_calls(module.graph)
        self.writes = [node for node in self.nodes if all_written_by(node)]
        self.spent, freed = module.meta.get(_SPENT, (0, ()))
        self.freed = set[str](freed)
        self._order, self._memory, self._names = memories(module.graph)
        self._written = {self._memory[base] for write in self.writes for base in all_written_by(write)}

    def affordable(self) -> list[Node]:
        """Return the calls to fold: read by other nodes, and together not much larger than what they follow from. The others
        are removed from :attr:`nodes`.
        """
        state = {t.data_ptr(): t.numel() for t in (*self.module.parameters(), *self.module.buffers())}
        share = 0.0 if any(map(_is_quantized, self.module.graph.nodes)) else _GROWTH
        allowed = max(_LEAST_GROWTH, share * sum(state.values()))
        found, computed = set[Node](), set[Node]()
        while ends := [node for node in self.nodes - found - computed if self._is_read(node, computed)]:
            growth = {node: self._growth(node, set()) for node in ends}
            for node in sorted(ends, key=lambda n: (growth[n], self._order[n])):
                freed = set[str]()
                if self.spent + (grown := self._growth(node, freed)) <= allowed:
                    self.spent += grown
                    self.freed |= freed
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

    def _growth(self, node: Node, freed: set[str]) -> int:
        """The bytes that the value of ``node`` takes beyond those of the constants that are then not read any more, which are
        added to ``freed``. A weight takes none, since it is read in any case, perhaps as integers.
        """
        if any(_is_weight(node, user) for user in node.users):
            return 0
        grown = tensor_value(node).nbytes
        for read in constants_before([node]):
            if str(read.target) not in self.freed and self.nodes.issuperset(read.users):
                freed.add(str(read.target))
                grown -= tensor_of(self.module, read).nbytes
        return max(0, grown)

    def _with_writes(self, node: Node) -> set[Node]:
        """``node`` and, if it is in or reads memory that is written in place, all nodes in that memory, and so on. It must not
        read a value that is already complete.
        """
        left, ahead = set[Node](), [node]
        while ahead:
            inner = ahead.pop()
            if inner in left or inner not in self.nodes:
                continue
            left.add(inner)
            for memory in {self._memory[n] for n in (inner, *inner.all_input_nodes)} & self._written:
                ahead += self._names[memory]
        return left
