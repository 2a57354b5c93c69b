"""The evaluator: the loss of accuracy on labelled data or, without labels, of agreement with the float network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule

from quantflow.data.batches import PickInputs, batches
from quantflow.data.sample import cut_inputs
from quantflow.errors import QuantflowError
from quantflow.graph.own_state import state_kept
from quantflow.graph.state import inputs_kept, state_reads
from quantflow.lowering.program import Program
from quantflow.signature.signature import Signature
from quantflow.simulation.stateful_calls import state_of
from quantflow.upstream import pytree

Flat = list[Any]


class Evaluator:
    """Compares a network's classes with those of its float network, on the same data.

    Args:
        graph: The float graph. Its first output holds scores, [examples, classes].
        data: Batches that can be gone through again. With integer targets, [examples], accuracy is compared; without, how often
            the class is another than that of the float network.
        inputs: Picks the inputs out of a batch, where that is ambiguous.

    Attributes:
        labelled: Whether there are targets.
        examples: How many examples there are.

    Raises:
        QuantflowError: at stage ``"accuracy-control"``, when the data are of another kind.
    """

    def __init__(self, graph: GraphModule, data: Iterable[object], inputs: PickInputs | None = None) -> None:
        if iter(data) is data:
            remedy = "pass a list of batches or a DataLoader"
            raise QuantflowError(
                "accuracy-control", "the data can be gone through once only", node="data", remedy=remedy
            )
        self.graph, self.data, self.inputs = graph, data, inputs
        self.signature = Signature.of_graph(graph)
        self.cut = cut_inputs(self.signature)
        with state_kept(graph):
            given = [(self._float_classes(flat), target) for flat, target, _ in self._flat()]
        if not given:
            raise QuantflowError(
                "accuracy-control", "there is no data to judge by", node="data", remedy="pass at least one batch"
            )
        self.labelled = all(target is not None for _, target in given)
        self.examples = sum(len(found) for found, _ in given)
        # Without targets, the float network is right.
        equal = [found == (_targets(target, len(found)) if self.labelled else found) for found, target in given]
        self._float_right = sum(int(each.sum()) for each in equal)

    def drop_of(self, network: Callable[[Flat], list[torch.Tensor]]) -> float:
        """The drop of a network from flat inputs, with the state behind them if it keeps any, to its float outputs."""
        return self._drop(lambda flat: [_classes(network(flat))], lambda: None)

    def drop_on_runtime(self, program: Program) -> float:
        """The drop of ``program``, measured on the runtime. Its state begins anew with each sequence, and at the end."""
        size, inputs = self._batch_of(program), len(self.signature.inputs)
        drop = self._drop(lambda flat: self._in_parts(program, flat[:inputs], size), program.reset)
        program.reset()
        return drop

    def _drop(self, classes: Callable[[Flat], Iterable[torch.Tensor]], begin: Callable[[], None]) -> float:
        return (self._float_right - self._right(classes, begin)) / self.examples

    def _right(self, classes: Callable[[Flat], Iterable[torch.Tensor]], begin: Callable[[], None]) -> int:
        """The number of correctly classified examples. A loader may return them in another order each time."""
        right, reads = 0, state_reads(self.graph.graph)
        with state_kept(self.graph):
            begin()
            for flat, target, begins in self._flat():
                if begins:
                    begin()
                before = state_of(self.graph, reads)
                floats = None if self.labelled and not reads else self._float_classes(flat)
                found = torch.cat(list(classes([*flat, *before])))
                right += int((found == _targets(target if self.labelled else floats, len(found))).sum())
        return right

    @torch.no_grad()
    def _float_classes(self, flat: Flat) -> torch.Tensor:
        args, kwargs = inputs_kept(self.graph, self.signature.call(flat))
        return _classes(self.graph(*args, **kwargs))

    def _flat(self) -> Iterator[tuple[Flat, Any, bool]]:
        feed = batches(self.data, self.graph, stage="accuracy-control", inputs=self.inputs)
        for args, kwargs, target, begins in feed:
            yield self.signature.flatten(args, kwargs, stage="accuracy-control"), target, begins

    def _batch_of(self, program: Program) -> int | None:
        """The batch size that ``program`` was lowered for; None if it is dynamic."""
        sizes = [i.shape[0] for i, cut in zip(program.signature.inputs, self.cut, strict=True) if cut]
        return sizes[0] if sizes and isinstance(sizes[0], int) else None

    def _in_parts(self, program: Program, flat: Flat, size: int | None) -> Iterator[torch.Tensor]:
        """The classes of one batch, computed in slices of ``size`` examples; the last slice is padded with its own examples."""
        rows = next((len(t) for t, cut in zip(flat, self.cut, strict=True) if cut), 0)
        for start in range(0, rows, size) if size else (0,):
            some = torch.arange(start, start + size).clamp(max=rows - 1) if size else slice(None)
            part = [t[some] if cut else t for t, cut in zip(flat, self.cut, strict=True)]
            assert program.signature.in_spec is not None
            args, kwargs = pytree.tree_unflatten(part, program.signature.in_spec)
            yield _classes(program(*args, **kwargs))[: rows - start if size else None]


def _classes(outputs: object) -> torch.Tensor:
    scores = next(
        (t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()), None
    )
    if scores is None or scores.ndim != 2:
        shape = "no float tensor" if scores is None else f"of shape {list(scores.shape)}"
        remedy = "max_drop is for classifiers, whose first output holds scores [examples, classes]"
        raise QuantflowError("accuracy-control", f"the first output is {shape}", node="model", remedy=remedy)
    return scores.argmax(1).cpu()


def _targets(target: object, examples: int) -> torch.Tensor:
    if not isinstance(target, torch.Tensor) or target.shape != (examples,) or target.is_floating_point():
        remedy = "integer classes, [examples], as a DataLoader gives; or batches without targets"
        raise QuantflowError("accuracy-control", "the targets are no classes", node="data", remedy=remedy)
    return target.cpu()
