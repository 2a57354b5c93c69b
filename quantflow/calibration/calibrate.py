"""``calibrate``: runs data through a prepared graph, so that its observers measure ranges (PTQ)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from quantflow.conversion.requantization import warn_of_dead_activations
from quantflow.data.batches import PickInputs, batches, count_of
from quantflow.data.sample import Sample
from quantflow.distributed import Peers
from quantflow.errors import QuantflowError
from quantflow.graph.own_state import state_kept
from quantflow.graph.parameters import device_of
from quantflow.graph.state import inputs_kept, state_reads
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.observers.observation import affine, observers_of, watching
from quantflow.observers.synchronization import begin_together, check_synchronizable, synchronize
from quantflow.signature.signature import Signature
from quantflow.simulation.stateful_calls import state_of

G = TypeVar("G", bound=GraphModule)
_SETTLED = 0.01  # relative growth of a range below which it counts as converged


def calibrate(
    graph: G,
    data: Iterable[object],
    *,
    inputs: PickInputs | None = None,
    max_batches: int | None = None,
    patience: int | None = None,
    device: torch.device | str | None = None,
    sample: Sample | None = None,
    progress: bool = True,
) -> G:
    """Run ``data`` through the prepared ``graph`` in inference mode, without gradients, and let its observers record ranges.

    State that the graph writes (a counter, a cache) goes on from batch to batch, begins anew with each
    :class:`quantflow.CallSequence`, and is given back as it was at the end; inputs that it writes are copied first.

    Under ``torchrun`` each process takes its own share of the data, of any number of batches; at the end all hold the same
    statistics, with the extremes of all data to the bit. A process that fails, is killed or hangs ends the others in an
    error that names it. The statistics are in ``state_dict()``, from which a calibration goes on.

    Args:
        graph: A prepared graph. Its observers are updated in place; its mode is left as it was.
        data: An iterable of batches: tensors, tuples or dicts of inputs, or ``(inputs, target)`` as a DataLoader gives.
        inputs: Picks the inputs out of a batch, where that is ambiguous: returns a tensor, a tuple of positional inputs or a
            dict of keyword inputs.
        max_batches: The most batches to run; None for all.
        patience: Stop when, for so many batches in a row, no range grew by more than 1 %. Each of several processes stops by
            its own data.
        device: The device to move the graph and the batches to; by default that of the graph's parameters.
        sample: Also draw examples from the data as they pass, for :func:`quantflow.recover`.
        progress: Show a progress bar.

    Returns:
        ``graph``.

    Raises:
        QuantflowError: at stage ``"calibrate"``, when the graph is not prepared, there is no data, or a batch does not fit
            what the graph takes; the batches before the faulty one have been observed then. The scales that training uses
            stay as they were.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> graph = qf.export(model, (torch.randn(1, 3, 8, 8),), dynamic_batch=True).module()
        >>> prepared = qf.prepare(graph, XNNPACKQuantizer())
        >>> qf.calibrate(prepared, [torch.randn(4, 3, 8, 8) for _ in range(2)], progress=False) is prepared
        True
    """
    with Peers("calibrate") as peers:
        if not isinstance(graph, GraphModule) or not observers_of(graph):
            remedy = "call qf.prepare(graph, quantizer) first"
            raise QuantflowError("calibrate", "the graph was not prepared", node="graph", remedy=remedy)
        device = device or device_of(graph)
        graph.to(device)
        total = count_of(data, max_batches, stage="calibrate")
        feed = itertools.islice(batches(data, graph, stage="calibrate", inputs=inputs, device=device), max_batches)
        signature = Signature.of_graph(graph)
        converged = _Converged(graph, patience)
        reads, seen = state_reads(graph.graph), 0
        check_synchronizable(graph)
        with _calibrating(graph), state_kept(graph), torch.no_grad():
            begin_together(graph, peers)
            for batch in tqdm(feed, desc="calibrate", total=total, unit="batch", disable=not progress, leave=False):
                if sample is not None:
                    flat = signature.flatten(batch.args, batch.kwargs, stage="calibrate")
                    sample.add((*flat, *state_of(graph, reads)), signature)
                try:
                    args, kwargs = inputs_kept(graph, (batch.args, batch.kwargs))
                    graph(*args, **kwargs)
                except QuantflowError:
                    raise
                except Exception as error:
                    reason = f"the graph does not run on it: {type(error).__name__}: {str(error)[:400]}"
                    remedy = "check what the batch holds (token numbers beyond the vocabulary, for one)"
                    raise QuantflowError("calibrate", reason, node=f"batch {seen}", remedy=remedy) from error
                seen += 1
                if converged():
                    break
            _check_seen(peers.answers(seen))
            synchronize(graph)
            if sample is not None:
                sample.synchronize()
    warn_of_dead_activations(graph)
    return graph


def _check_seen(counts: list[int]) -> None:
    """Raise if a process had no data."""
    if all(counts):
        return
    empty = ", ".join(f"rank {rank}" for rank, count in enumerate(counts) if not count)
    if len(counts) == 1:
        raise QuantflowError("calibrate", "the calibration set is empty", node="data", remedy="pass at least one batch")
    reason, remedy = "its share of the calibration set is empty", "give each process at least one batch"
    raise QuantflowError("calibrate", reason, node=empty, remedy=remedy)


class _Converged:
    """A stopping criterion: whether ranges have stopped growing."""

    def __init__(self, graph: GraphModule, patience: int | None) -> None:
        self.watching = [watching(o) for o in observers_of(graph).values() if not getattr(o, "is_dynamic", False)]
        self.patience, self.quiet = patience, 0
        self.widths: torch.Tensor | None = None

    def __call__(self) -> bool:
        if self.patience is None:
            return False
        # A torchao observer may have no range (fixed parameters), or one of another shape before the first data.
        ranged = [affine(o) for o in self.watching if isinstance(getattr(o, "min_val", None), torch.Tensor)]
        now = torch.cat([torch.empty(0), *((o.max_val - o.min_val).flatten().float().cpu() for o in ranged)])
        grew = self.widths is None or len(now) != len(self.widths) or bool((now > self.widths * (1 + _SETTLED)).any())
        self.quiet = 0 if grew else self.quiet + 1
        self.widths = now if grew else self.widths
        return self.quiet >= self.patience


@contextlib.contextmanager
def _calibrating(graph: GraphModule) -> Iterator[None]:
    training = graph.training
    fake_quantizers = [m for m in graph.modules() if isinstance(m, FakeQuantize)]
    _set_mode(graph, False)
    for module in fake_quantizers:
        module.calibrate(True)
    failed = True
    try:
        yield
        failed = False
    finally:
        for module in fake_quantizers:
            module.calibrate(False, failed=failed)
        _set_mode(graph, training)


def _set_mode(graph: GraphModule, training: bool) -> None:
    # A graph that stock torchao prepared raises in train() and eval(); its mode is stored on its nodes.
    with contextlib.suppress(NotImplementedError):
        graph.train(training)
