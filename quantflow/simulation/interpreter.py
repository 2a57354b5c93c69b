"""The interpreter: a captured graph run node by node, in float, in integers, or with some of its observers quantizing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quantflow.graph.aten import op
from quantflow.graph.parameters import tensor_of
from quantflow.graph.state import aliased_by, is_written, overwritten, state_reads, writes_for_others
from quantflow.observers.observation import observer_of
from quantflow.simulation.fake_quantized import fake_quantized
from quantflow.simulation.float_weights import attribute, float_weight, given_input
from quantflow.upstream import pytree
from quantflow.upstream.autocast import enter_autocast, exit_autocast
from quantflow.upstream.grad_mode import set_grad_enabled

# The interpreter has a gradient mode of its own, and no autocast.
_MODES = (torch.is_grad_enabled, set_grad_enabled, enter_autocast, exit_autocast)

Values = dict[Node, Any]
UNKNOWN = object()
# Values that need not be computed: by node, or a function of the node and the values before it that may return UNKNOWN.
Known = Mapping[Node, Any] | Callable[[Node, Values], Any]


class Interpreter:
    """Runs a captured, prepared or converted graph node by node. The graph, its state and its observers stay as they are.

    Args:
        graph: The graph.
        quantize: Whether observers quantize what they observe; or the nodes of those that do.
        float_weights: Read each weight as it was before post-training algorithms changed it.
        gradients: Let float inputs, and what is computed from integer inputs, require a gradient.
        observers: Observers to use instead of the graph's own, by the node that calls them.
    """

    def __init__(
        self,
        graph: GraphModule,
        *,
        quantize: bool | Collection[Node] = False,
        float_weights: bool = False,
        gradients: bool = False,
        observers: Mapping[Node, nn.Module] | None = None,
    ) -> None:
        self.graph, self.float_weights, self.gradients = graph, float_weights, gradients
        self._quantize, self._observers = quantize, observers or {}

    def run(
        self,
        inputs: Iterable[object] = (),
        *,
        nodes: Iterable[Node] | None = None,
        values: Values | None = None,
        known: Known | None = None,
        keep: bool = False,
    ) -> Iterator[tuple[Node, Values]]:
        """Compute each node in turn, and yield it with the values that are alive, its own among them.

        The caller may replace the value of a node when it is yielded. ``output`` comes last. Its value is the flat list of what
        the graph returns and, where the batch holds the state, of how each state changes.

        Args:
            inputs: The flat inputs of one batch, with or without the state before the call behind them, as in a
                :class:`quantflow.Sample`. Without it, the call begins in the state that the graph has.
            nodes: What to compute; by default the whole graph.
            values: Where the values are held, with those that ``nodes`` read from before them.
            known: Values that need not be computed.
            keep: Hold all values; otherwise a value is dropped behind its last reader.
        """
        values, given = {} if values is None else values, list[Any](inputs)
        # A sample may be of the graph before half precision became float32.
        states = zip(self._states, given[self._inputs :], strict=False)
        before = {read: state.to(tensor_of(self.graph, read).dtype) for read, state in states}
        feed = iter(given[: self._inputs])
        lookup = known if callable(known) else lambda node, _: (known or {}).get(node, UNKNOWN)
        for node in self.graph.graph.nodes if nodes is None else nodes:
            if node.op == "output":
                changes = [_change(before[n], values[n]) for n in before]
                values[node] = returned(node, values) + changes
            elif node in before:
                values[node] = self._given(node, before[node])
            else:
                held = lookup(node, values)
                values[node] = self.value(node, values, feed) if held is UNKNOWN else held
            yield node, values
            if not keep:
                for read in self._last_reads.get(node, ()):
                    if read not in before:
                        values.pop(read, None)

    def outputs(
        self,
        inputs: Iterable[object],
        *,
        values: Values | None = None,
        known: Known | None = None,
        keep: bool = False,
    ) -> list[Any]:
        """The value of the output for one batch; the arguments are those of :meth:`run`."""
        result: list[Any] = []
        for node, alive in self.run(inputs, values=values, known=known, keep=keep):
            if node.op == "output":
                result = alive[node]
        return result

    def value(self, node: Node, values: Values, inputs: Iterator[Any] = iter(())) -> Any:  # noqa: B008  it is empty
        """The value of ``node``, which is not the output, from those of the nodes that it reads.

        Args:
            node: The node.
            values: The values before it.
            inputs: The flat inputs that are left; a placeholder takes the next one.
        """
        if node.op == "placeholder":
            return self._given(node, next(inputs))
        if node.op == "get_attr":
            now = attribute(self.graph, node)
            return float_weight(node, now) if self.float_weights else now
        if self.gradients:
            # A later write would change what autograd saves for the backward pass.
            base = aliased_by(node)
            read = [n for n in node.all_input_nodes if n in self._overwritten and n is not base]
            copies = {n: values[n].clone() for n in read if isinstance(values[n], torch.Tensor)}
            values = values | copies if copies else values
        if node.op == "call_function":
            x = evaluate(node, values)
            return _with_gradient(node, x) if self.gradients else x
        observer = self._observers[node] if node in self._observers else observer_of(node, self.graph)
        args = cast(tuple, map_arg(node.args, lambda n: values[n]))
        if observer is None:
            return self.graph.get_submodule(str(node.target))(*args)
        return fake_quantized(observer, args[0], node.users) if self._quantizes(node) else args[0]

    def _given(self, node: Node, x: Any) -> Any:
        if self.gradients and isinstance(x, torch.Tensor) and x.is_floating_point():
            x = x.detach().clone().requires_grad_()  # a leaf can't be written: given_input copies it
        return given_input(node, x)

    @functools.cached_property
    def _inputs(self) -> int:
        return len(self.graph.graph.find_nodes(op="placeholder"))

    @functools.cached_property
    def _states(self) -> list[Node]:
        return state_reads(self.graph.graph)

    @functools.cached_property
    def _overwritten(self) -> frozenset[Node]:
        return overwritten(self.graph.graph)

    def _quantizes(self, node: Node) -> bool:
        return self._quantize if isinstance(self._quantize, bool) else node in self._quantize

    @functools.cached_property
    def _last_reads(self) -> dict[Node, list[Node]]:
        """For each node, the nodes whose value nothing reads after it."""
        last = {read: node for node in self.graph.graph.nodes for read in (node, *node.all_input_nodes)}
        dead: dict[Node, list[Node]] = {}
        for read, node in last.items():
            dead.setdefault(node, []).append(read)
        return dead


def evaluate(node: Node, values: Values) -> Any:
    """The value of the operator ``node`` from those of the nodes that it reads.

    An in-place operator is called as its functional form, unless other nodes are to see what it writes.
    """
    if node.target in _MODES:
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
    target = node.target if writes_for_others(node) else op(node)
    return cast(Callable, target)(*args, **kwargs)


def returned(output: Node, values: Values) -> list[Any]:
    """What the ``output`` node returns, flat."""
    return [values[leaf] if isinstance(leaf, Node) else leaf for leaf in pytree.tree_leaves(output.args)]


def _change(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """The difference of a float state, zero where it is equal (as two infinities are); another state as it is ``now``."""
    return torch.where(now == before, torch.zeros_like(now), now - before) if now.is_floating_point() else now


def float_tensors(leaves: Iterable[object]) -> list[torch.Tensor]:
    """The float tensors among ``leaves``."""
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _with_gradient(node: Node, x: Any) -> Any:
    """``x``, the value of ``node``, as the start of a gradient where it is float and depends on none, as an embedding does."""
    if not torch.is_grad_enabled() or not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.requires_grad:
        return x
    if all(n.op == "get_attr" for n in node.all_input_nodes):
        return x
    if not is_written(node):
        return x.detach().requires_grad_()
    # A part of an older tensor is written there, and has a gradient once something with one is written.
    return x if aliased_by(node) is not None else x.detach().requires_grad_().clone()
