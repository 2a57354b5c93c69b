"""``RuleQuantizer``: a quantizer that annotates a graph by a table of rules."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Self

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import EdgeOrNode, QuantizationAnnotation, Quantizer, SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY, QuantizationSpecBase

from quantflow.errors import QuantflowError
from quantflow.graph.aten import argument
from quantflow.graph.batch_norm import fold_batch_norm, norm_as_convolution
from quantflow.graph.constant_folding import fold_constants
from quantflow.graph.dead_code import drop_dead_code
from quantflow.graph.flattened_norm import flatten_before_linear
from quantflow.graph.half_precision import compute_in_float32
from quantflow.graph.rewrites import Rewrite, rewrite
from quantflow.upstream.annotations import mark_annotated
from quantflow.upstream.operators import OpOverload
from quantizers.annotation_edges import Edges, quantized_edges
from quantizers.decision import Decision
from quantizers.dynamic_rewrites import where_dynamic
from quantizers.kernels import FloatKernels
from quantizers.override import Overrides, Where, overrides_from
from quantizers.plan import Plan, make_plan
from quantizers.plan_warnings import warn_of_unmet_requests
from quantizers.rule import Rule
from quantizers.scheme import INT8, Scheme, named_scheme
from quantizers.symmetry import symmetric_grids


class RuleQuantizer(Quantizer):
    """Annotates a graph by a table of rules, on torchao's protocol; works in stock ``prepare_pt2e`` as well.

    Args:
        scheme: The scheme where no override says otherwise, or its name (``"w8a8"``, ``"w4a8"``, ``"dynamic-w8a8"``,
            ``"dynamic-w4a8"``); None for float.
        overrides: Exceptions by layer name, module type or predicate, each to a scheme or to None (float). Later ones win.
        skip: Layers to leave in float, as names, types or predicates: short for overrides to None.
        rules: The table; by default the class attribute ``rules``.
        strict: Raise an error instead of a warning for a layer that an override asks in integers and that stays in float, and
            for float between integers that leaves the delegate.

    Attributes:
        rules: The table of rules; a subclass sets it.
        rewrites: Rewrites of operators that the backend lacks, exact in float; they are done before the rules apply.
        dynamic_rewrites: Further rewrites, of nodes that are asked for with dynamic activations.
        float_kernels: The float operators of the backend; with None, plans do not tell delegate calls.
        precisions: The schemes that :func:`quantflow.search` chooses from, by name.
        dynamic: The scheme with dynamic activations that linear layers fall back to; None where the backend has none.
        unsupported: Why an operator has no rule, by operator, for plans.

    Raises:
        QuantflowError: at stage ``"plan"``, when a scheme is none or one that the backend refuses.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import Rule, RuleQuantizer
        >>> rule = Rule("linear", frozenset({torch.ops.aten.linear.default}), weight="weight")
        >>> quantizer = RuleQuantizer(rules=[rule])
        >>> graph = qf.export(torch.nn.Linear(8, 4).eval(), (torch.randn(1, 8),)).module()
        >>> prepared = qf.prepare(graph, quantizer)
        >>> len(quantizer.plan(graph).integer)
        1
    """

    rules: Sequence[Rule] = ()
    rewrites: Mapping[OpOverload, Rewrite] = {}
    dynamic_rewrites: Mapping[OpOverload, Rewrite] = {}
    float_kernels: FloatKernels | None = None
    precisions: Mapping[str, Scheme | None] = {"float": None, "int8": INT8}  # defaults of quantflow.search
    dynamic: Scheme | None = None
    unsupported: Mapping[object, str] = {}

    def __init__(
        self,
        scheme: Scheme | str | None = INT8,
        *,
        overrides: Overrides = (),
        skip: Where | Iterable[Where] = (),
        rules: Sequence[Rule] | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.scheme = named_scheme(scheme) if isinstance(scheme, str) else scheme
        self.strict = strict
        skip = [skip] if isinstance(skip, (str, type)) or callable(skip) else skip
        self.overrides = (*overrides_from(overrides), *overrides_from([(where, None) for where in skip]))
        self._check(self.scheme, *(override.scheme for override in self.overrides))
        if rules is not None:
            self.rules = tuple(rules)

    def overriding(self, overrides: Overrides) -> Self:
        """Return a copy of this quantizer with more overrides.

        Args:
            overrides: As for the class; they win over those that it has.

        Returns:
            The copy.

        Raises:
            QuantflowError: at stage ``"plan"``, when the backend refuses a scheme.
        """
        other, more = copy.copy(self), overrides_from(overrides)
        self._check(*(override.scheme for override in more))
        other.overrides = (*self.overrides, *more)
        return other

    def with_scheme(self, scheme: Scheme | str | None) -> Self:
        """Return a copy of this quantizer with another scheme where no override says otherwise.

        Args:
            scheme: As for the class.

        Returns:
            The copy.

        Raises:
            QuantflowError: at stage ``"plan"``, when the scheme is none or one that the backend refuses.
        """
        other = copy.copy(self)
        other.scheme = named_scheme(scheme) if isinstance(scheme, str) else scheme
        self._check(other.scheme)
        return other

    def plan(self, graph: GraphModule, *, qat: bool = False) -> Plan:
        """Decide what becomes of each node, and why not integers; the graph stays as it is.

        The nodes are those of the graph after the backend's rewrites: a silu is there as a sigmoid and a product.

        Args:
            graph: A captured graph.
            qat: Plan for QAT instead of PTQ.

        Returns:
            The plan; ``print`` shows it as a table.

        Raises:
            QuantflowError: at stage ``"plan"``, when ``graph`` is no captured graph or an override matches no layer.
        """
        if not isinstance(graph, GraphModule):
            remedy = "pass qf.export(model, args).module()"
            raise QuantflowError("plan", f"{type(graph).__name__} is no captured graph", node="graph", remedy=remedy)
        copied = GraphModule(graph, copy.deepcopy(graph.graph))  # shares the parameters
        drop_dead_code(copied.graph, trains=qat)
        compute_in_float32(copied)
        flatten_before_linear(copied)
        fold_constants(copied)
        if not qat:
            if any(s is not None and s.activation.dynamic for s in (self.scheme, *(o.scheme for o in self.overrides))):
                fold_batch_norm(copied)  # the rewrites of these change what batch norm stands behind
            norm_as_convolution(copied)
        self.transform_for_annotation(copied)
        fold_constants(copied)
        return self._plan(copied)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Rewrite operators that the backend lacks as others that it has, exact in float.

        Args:
            model: A captured graph, changed in place.

        Returns:
            The graph.
        """
        rewrite(model, self.rewrites)
        dynamic = self.dynamic_rewrites.items()
        return rewrite(model, {target: where_dynamic(apply, self.scheme, self.overrides) for target, apply in dynamic})

    def _check(self, *schemes: Scheme | None) -> None:
        for given in schemes:
            if given is not None and not isinstance(given, Scheme):
                raise QuantflowError("plan", f"{given!r} is no Scheme", node="scheme", remedy="INT8, W4A8, Scheme(...)")
            if given is not None and (reason := self.refuse_scheme(given)):
                raise QuantflowError("plan", reason, node=f"scheme {given}", remedy="another Scheme, as INT8")

    def _plan(self, graph: GraphModule) -> Plan:
        asked = self.scheme, self.overrides
        return make_plan(graph.graph, self.rules, *asked, self.refuse_node, self.float_kernels, self.unsupported)

    def refuse_scheme(self, scheme: Scheme) -> str | None:
        """Tell why the backend can't compute in a scheme; a subclass overrides it.

        Args:
            scheme: The scheme.

        Returns:
            The reason; None where the backend can.
        """
        return None

    def refuse_node(self, node: Node) -> str | None:
        """Tell why the backend can't run a node in integers, whatever its rule; a subclass overrides it.

        Args:
            node: The node.

        Returns:
            The reason; None where the backend can.
        """
        return None

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the plan onto the nodes, as torchao annotations.

        Args:
            model: A captured graph, changed in place.

        Returns:
            The graph.

        Raises:
            QuantflowError: at stage ``"plan"``, when an override matches no layer; where the quantizer is ``strict``, also for
                what is otherwise a warning.
        """
        plan = self._plan(model)
        warn_of_unmet_requests(plan, strict=self.strict)
        edges = quantized_edges(plan)
        symmetric = symmetric_grids(plan, edges)
        for decision in plan.integer:
            _annotate(decision, plan.effective_range(decision), edges, symmetric)
        return model

    def validate(self, model: GraphModule) -> None:
        """Do nothing: the plan already refuses what the backend can't run.

        Args:
            model: The annotated graph.
        """


def _annotate(
    decision: Decision, effective_range: tuple[float, float] | None, edges: Edges, symmetric: Set[EdgeOrNode]
) -> None:
    rule, scheme, node = decision.rule, decision.scheme, decision.node
    assert rule is not None
    assert scheme is not None
    # Dynamic scales and zero points are computed by each reader, so symmetry is not needed.
    centred = scheme.activation if scheme.activation.dynamic else replace(scheme.activation, symmetric=True)
    shared: SharedQuantizationSpec | None = None
    for given in decision.activations():
        producer, consumer = edge = edges[given, node]
        grid = centred if not symmetric.isdisjoint((edge, producer)) else scheme.activation
        _annotation(consumer).input_qspec_map.setdefault(producer, grid.spec())  # one spec per consumer and tensor
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
        mark_annotated(_annotation(member))
    if not scheme.activation.dynamic:
        grid = centred if decision.tail in symmetric else scheme.activation
        _annotation(decision.tail).output_qspec = shared or grid.spec(effective_range=effective_range)


def _annotation(node: Node) -> QuantizationAnnotation:
    return node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation())


def _join(edge: EdgeOrNode, shared: SharedQuantizationSpec) -> None:
    """Make ``edge``, and all edges and outputs that share with it, share the observer of ``shared``."""
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
