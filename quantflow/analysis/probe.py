"""``probe``: compares the tensors within a program on the runtime, delegates included, with those of its graph."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from tqdm import tqdm

from quantflow.analysis.intermediate_outputs import (
    IntermediateOutput,
    intermediate_outputs_of,
    with_intermediate_outputs,
)
from quantflow.analysis.node_matching import converts, matches
from quantflow.analysis.probe_result import Probed, ProbeResult
from quantflow.analysis.reference import converted_form, reference_graph
from quantflow.capture.export import export
from quantflow.data.batches import PickInputs, batches
from quantflow.data.sample import cut_inputs
from quantflow.delegates import DelegateLike
from quantflow.errors import QuantflowError
from quantflow.graph.aten import layer, op, short_name
from quantflow.graph.state import overwritten
from quantflow.lowering.program import Program
from quantflow.metrics import decibels, squares
from quantflow.signature.signature import Signature
from quantflow.simulation.interpreter import Interpreter
from quantflow.upstream import pytree


def probe(
    quantized_graph: GraphModule,
    data: Iterable[object],
    *,
    float_graph: GraphModule | None = None,
    delegate: DelegateLike = "xnnpack",
    calls: int = 8,
    inputs: PickInputs | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Run a quantized network on the ExecuTorch runtime and compare its tensors there with the graph's, one by one.

    The network is lowered with all its activations as further outputs, those within delegates too. Each operator is computed
    in PyTorch as well, from the very tensors that the runtime gave it: where both differ by more than a rounding, the
    delegate computes something else than the graph says. Memory does not grow with the data.

    Args:
        quantized_graph: A converted graph, of :func:`quantflow.convert` or another tool, or a prepared and calibrated one.
        data: Batches, as for :func:`quantflow.calibrate`; targets are not used.
        float_graph: What ``Exported.module()`` returned, to compare with it too.
        delegate: The delegate to lower to, as in ``CoreAten.to_edge``.
        calls: The most calls of the program: of one example each where the batch size is dynamic, else of a batch.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        progress: Show a progress bar.

    Returns:
        The comparison of each tensor; ``print`` shows a table.

    Raises:
        QuantflowError: at stage ``"probe"``, when the graph is not quantized or keeps state, a batch does not fit it or the
            float graph, ``calls`` is not positive, or there is no data; as lowering raises.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> x = torch.randn(1, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
        >>> found = qf.probe(qf.calibrate(prepared, [x], progress=False), [x], progress=False)
        >>> [tensor.node for tensor in found.tensors]
        ['input_1', 'conv2d']
    """
    if not isinstance(calls, int) or calls < 1:
        raise QuantflowError("probe", f"{calls} calls show nothing", node="calls", remedy="8, say")
    graph = converted_form(quantized_graph, "probe")
    intermediates = [_Sums(intermediate) for intermediate in intermediate_outputs_of(graph)]
    reference = None if float_graph is None else reference_graph(float_graph, "probe")
    pairs = {} if reference is None else matches(graph.graph, reference.graph)
    opened = with_intermediate_outputs(graph, [sums.intermediate for sums in intermediates])
    programs: dict[tuple, Program] = {}  # by input shapes
    feed, ran = itertools.islice(_calls(graph, data, inputs), calls), 0
    for flat in tqdm(feed, desc="probe", total=calls, unit="call", disable=not progress, leave=False):
        exact = {} if reference is None else _float_values(reference, graph, flat, pairs)
        shapes = tuple(t.shape if isinstance(t, torch.Tensor) else t for t in flat)
        if shapes not in programs:
            programs[shapes] = _lowered(opened, flat, delegate)
        found = list(programs[shapes](*flat))
        _compare(graph, flat, intermediates, found[len(found) - len(intermediates) :], exact)
        ran += 1
    if not programs:
        raise QuantflowError("probe", "there is no data", node="data", remedy="pass at least one batch")
    called = max(p.delegation.calls for p in programs.values() if p.delegation is not None)
    return ProbeResult(tuple(sums.probed() for sums in intermediates), called, ran)


@dataclass
class _Sums:
    """Signal and noise of one intermediate output, summed over all calls."""

    intermediate: IntermediateOutput
    local: tuple[float, float] = (0.0, 0.0)  # of squares: signal and noise
    accumulated: tuple[float, float] = (0.0, 0.0)
    against_float: tuple[float, float] | None = None
    most: float = 0.0
    changed: int = 0
    count: int = 0

    def add(self, found: torch.Tensor, local: torch.Tensor, own: torch.Tensor, exact: torch.Tensor | None) -> None:
        """Add one call: the runtime's tensor, the operator's result in PyTorch, the graph's tensor and the float network's."""
        self.local = _sum(self.local, squares(local, found))
        self.accumulated = _sum(self.accumulated, squares(own, found))
        if exact is not None and exact.shape == found.shape:
            self.against_float = _sum(self.against_float or (0.0, 0.0), squares(exact, found))
        differs = (found != local) & ~(found.isnan() & local.isnan())
        apart = (found - local)[differs].abs().nan_to_num(math.inf)
        self.most = max(self.most, float(apart.max()) if apart.numel() else 0.0)
        self.changed += int(differs.sum())
        self.count += found.numel()

    def probed(self) -> Probed:
        node = self.intermediate.node
        return Probed(
            node.name,
            layer(node),
            "input" if node.op == "placeholder" else short_name(op(node)),
            self.intermediate.step,
            local=decibels(*self.local),
            most_steps=None if self.intermediate.step is None else self.most / self.intermediate.step,
            changed=self.changed / max(self.count, 1),
            accumulated=decibels(*self.accumulated),
            against_float=None if self.against_float is None else decibels(*self.against_float),
        )


def _sum(sums: tuple[float, float], more: tuple[float, float]) -> tuple[float, float]:
    return sums[0] + more[0], sums[1] + more[1]


def _calls(graph: GraphModule, data: Iterable[object], inputs: PickInputs | None) -> Iterator[list[Any]]:
    """The flat inputs of each call: one example where the batch size is dynamic, else a batch."""
    signature = Signature.of_graph(graph)
    cut = cut_inputs(signature)
    for batch in batches(data, graph, stage="probe", inputs=inputs):
        flat = signature.flatten(batch.args, batch.kwargs, stage="probe")
        rows = next((len(t) for t, by_example in zip(flat, cut, strict=True) if by_example), None)
        if rows is None:
            yield flat
            continue
        for row in range(rows):
            yield [t[row : row + 1] if by_example else t for t, by_example in zip(flat, cut, strict=True)]


def _lowered(opened: GraphModule, flat: Sequence[object], delegate: DelegateLike) -> Program:
    core = export(opened, tuple(flat)).to_core_aten()
    signature = core.program.graph_signature
    for written in (*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()):
        reason, remedy = "the network writes it, and each call finds it otherwise", "probe the part that keeps no state"
        raise QuantflowError("probe", reason, node=written, remedy=remedy)
    # A difference between the program and its graph is what probe measures.
    return core.to_edge(delegate).to_executorch(check=False)


@torch.no_grad()
def _compare(
    graph: GraphModule,
    flat: Sequence[object],
    intermediates: list[_Sums],
    found: list[torch.Tensor],
    exact: dict[Node, Any],
) -> None:
    """Compute ``graph`` twice: from the inputs alone, and each operator from the runtime's own inputs of it."""
    there = {sums.intermediate.end: (sums, value) for sums, value in zip(intermediates, found, strict=True)}
    dequantized: dict[tuple, torch.Tensor] = {}  # the runtime's integers, by dequantize node
    written, network = overwritten(graph.graph), Interpreter(graph)
    runs = (network.run(flat, keep=True) for _ in range(2))
    for (node, own), (_, device) in zip(*runs, strict=True):
        if node in there:
            sums, value = there[node]
            sums.add(value, device[node], own[node], exact.get(sums.intermediate.node))
            dequantized[node.args] = value
            if node in written:  # other views of that memory have the value too
                device[node].copy_(value)
            else:
                device[node] = value
        elif converts(node) and node.args in dequantized:
            device[node] = dequantized[node.args].clone() if node in written else dequantized[node.args]


def _float_values(
    reference: GraphModule, graph: GraphModule, flat: Sequence[object], pairs: dict[Node, Node]
) -> dict[Node, Any]:
    """The float network's values, for the nodes of ``graph`` that have a match in it."""
    spec = Signature.of_graph(graph).in_spec
    args, kwargs = (flat, {}) if spec is None else pytree.tree_unflatten(flat, spec)
    given = Signature.of_graph(reference).flatten(args, kwargs, stage="probe")
    wanted = set(pairs.values())
    floats = {node: values[node] for node, values in Interpreter(reference).run(given) if node in wanted}
    return {node: floats[match] for node, match in pairs.items() if match in floats}
