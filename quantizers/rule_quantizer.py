"""A quantizer that is a table of rules."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Self

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import EdgeOrNode, QuantizationAnnotation, Quantizer, SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY, QuantizationSpecBase

from quantflow.errors import QuantflowError
from quantflow.graph.aten import argument
from quantflow.graph.batch_norm import norm_as_convolution
from quantflow.graph.dead_code import drop_dead_code
from quantflow.graph.rewrites import Rewrite, rewrite
from quantizers.annotation_edges import Edges, quantized_edges
from quantizers.kernels import FloatKernels
from quantizers.override import Overrides, Where, overrides_from
from quantizers.plan import Decision, Plan, make_plan
from quantizers.plan_warnings import warn_of_unmet_requests
from quantizers.rule import Rule
from quantizers.scheme import INT8, Scheme
from quantizers.symmetry import symmetric_grids


class RuleQuantizer(Quantizer):
    """Annotates a graph by a table of rules, on torchao's protocol; works in stock ``prepare_pt2e`` as well.

    Args:
        scheme: To which integers, where no override says otherwise; None for none.
        overrides: Exceptions by layer name, module type or predicate, each to a scheme or to None (float). Later ones win.
        skip: Layers to leave in float, as names, types or predicates: short for overrides to None.
        rules: The table; a subclass may have it as class attribute instead, with the ``rewrites`` that come before it and the
            ``float_kernels`` for what no rule takes (None: plans do not tell delegate calls) and, for plans, what the backend
            ``lacks``: why an operator has no rule.
        strict: Raise, where otherwise there would be a warning, for a layer that an override asks in integers and that stays in
            float, and for float between integers that leaves the delegate.
    """

    rules: Sequence[Rule] = ()
    rewrites: Mapping[Any, Rewrite] = {}
    float_kernels: FloatKernels | None = None
    precisions: Mapping[str, Scheme | None] = {"float": None, "int8": INT8}  # what a search chooses from
    lacks: Mapping[Any, str] = {}

    def __init__(
        self,
        scheme: Scheme | None = INT8,
        *,
        overrides: Overrides = (),
        skip: Where | Iterable[Where] = (),
        rules: Sequence[Rule] | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.scheme, self.strict = scheme, strict
        skip = [skip] if isinstance(skip, (str, type)) or callable(skip) else skip
        self.overrides = (*overrides_from(overrides), *overrides_from([(where, None) for where in skip]))
        self._check(scheme, *(override.scheme for override in self.overrides))
        if rules is not None:
            self.rules = tuple(rules)

    def overriding(self, overrides: Overrides) -> Self:
        """This quantizer with more overrides, which win over those it has."""
        other, more = copy.copy(self), overrides_from(overrides)
        self._check(*(override.scheme for override in more))
        other.overrides = (*self.overrides, *more)
        return other

    def plan(self, graph: GraphModule, *, qat: bool = False) -> Plan:
        """What will happen to each node of ``graph`` in PTQ (or QAT), and why not; changes nothing.

        The nodes are those of the graph to which the backend's rewrites are done: a silu is there as a sigmoid and a product.
        """
        if not isinstance(graph, GraphModule):
            remedy = "pass qf.export(model, args).module()"
            raise QuantflowError("plan", f"{type(graph).__name__} is no captured graph", node="graph", remedy=remedy)
        copied = GraphModule(graph, copy.deepcopy(graph.graph))  # shares the parameters
        drop_dead_code(copied.graph, trains=qat)
        if not qat:
            norm_as_convolution(copied)
        return self._plan(rewrite(copied, self.rewrites))

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Write operators that the backend lacks as others that it has, exact in float."""
        return rewrite(model, self.rewrites)

    def _check(self, *schemes: Scheme | None) -> None:
        for given in schemes:
            if given is not None and not isinstance(given, Scheme):
                raise QuantflowError("plan", f"{given!r} is no Scheme", node="scheme", remedy="INT8, W4A8, Scheme(...)")
            if given is not None and (reason := self.refuse_scheme(given)):
                raise QuantflowError("plan", reason, node=f"scheme {given}", remedy="another Scheme, as INT8")

    def _plan(self, graph: GraphModule) -> Plan:
        asked = self.scheme, self.overrides
        return make_plan(graph.graph, self.rules, *asked, self.refuse_node, self.float_kernels, self.lacks)

    def refuse_scheme(self, scheme: Scheme) -> str | None:
        """Why the backend can't compute in ``scheme``, None where it can. For subclasses."""
        return None

    def refuse_node(self, node: Node) -> str | None:
        """Why the backend can't run ``node`` in integers, whatever its rule; None where it can. For subclasses."""
        return None

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the plan onto the nodes, as torchao annotations.

        Raises:
            QuantflowError: at stage ``"plan"``, for what else is a warning, where the quantizer is ``strict``.
        """
        plan = self._plan(model)
        warn_of_unmet_requests(plan, strict=self.strict)
        edges = quantized_edges(plan)
        symmetric = symmetric_grids(plan, edges)
        for decision in plan.integer:
            _annotate(decision, plan.effective_range(decision), edges, symmetric)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to do: the plan refuses what the backend can't run."""


def _annotate(
    decision: Decision, effective_range: tuple[float, float] | None, edges: Edges, symmetric: Set[EdgeOrNode]
) -> None:
    rule, scheme, node = decision.rule, decision.scheme, decision.node
    assert rule is not None
    assert scheme is not None
    # A grid that is chosen at run time is its reader's own.
    centred = scheme.activation if scheme.activation.dynamic else replace(scheme.activation, symmetric=True)
    shared: SharedQuantizationSpec | None = None
    for given in decision.activations():
        producer, consumer = edge = edges[given, node]
        grid = centred if not symmetric.isdisjoint((edge, producer)) else scheme.activation
        _annotation(consumer).input_qspec_map.setdefault(producer, grid.spec())  # once, however often it is read
        if rule.output != "shared":
            continue
        if shared is None:
            shared = SharedQuantizationSpec((producer, consumer))
        else:
            _join((producer, consumer), shared)
    if rule.weight is not None:
        weight = argument(node, rule.weight)
        _annotation(node).input_qspec_map[weight] = scheme.weight.spec(rule.weight_axis)
    for member in decision.nodes:
        _annotation(member)._annotated = True
    if not scheme.activation.dynamic:
        grid = centred if decision.tail in symmetric else scheme.activation
        _annotation(decision.tail).output_qspec = shared or grid.spec(effective_range=effective_range)


def _annotation(node: Node) -> QuantizationAnnotation:
    return node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation())


def _join(edge: EdgeOrNode, shared: SharedQuantizationSpec) -> None:
    """Let ``edge``, and all that it shares a grid with, share that of ``shared``."""
    group = [shared.edge_or_node]
    while isinstance(spec := _spec(group[-1]), SharedQuantizationSpec):
        group.append(spec.edge_or_node)
    while edge not in group and isinstance(spec := _spec(edge), SharedQuantizationSpec):
        edge = spec.edge_or_node
    if edge in group:
        return
    if isinstance(edge, tuple):
        _annotation(edge[1]).input_qspec_map[edge[0]] = shared
    else:
        _annotation(edge).output_qspec = shared


def _spec(edge: EdgeOrNode) -> QuantizationSpecBase | None:
    if isinstance(edge, tuple):
        return _annotation(edge[1]).input_qspec_map[edge[0]]
    return _annotation(edge).output_qspec
