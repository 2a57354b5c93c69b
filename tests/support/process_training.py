"""Further cases for two processes: what they train and what they calibrate more than once."""

import copy

import torch
import torch.distributed as dist
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as Stock
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
from process_networks import Small, batches, prepared, ranges
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.distributed import SynchronizedBatchNorm
from quantflow.mixed_precision.choices import Choice, Table
from quantflow.observers import MovingAverageMinMaxObserver, MSEObserver
from quantflow.signature.signature import Signature


def train(graph, data=None, **options):
    history = qf.train(graph, data or batches(3, first=3 * dist.get_rank()), lr=0.01, progress=False, **options)
    return {"loss": history.loss, **ranges(graph)}


def fake_quantizers_of_torchao():
    quantizer = Stock().set_global(get_symmetric_quantization_config(is_qat=True))
    try:
        return train(prepared(quantizer=quantizer, qat=True))
    except qf.QuantflowError as error:
        return {"said": str(error)}


def observed_again():
    """Two rounds, of a batch in each process."""
    sampled, average = MSEObserver(), MovingAverageMinMaxObserver()
    for step in range(2):
        sampled(torch.full((4,), 10.0 * step + dist.get_rank()))
        average(torch.full((4,), float(step)))
        for observer in (sampled, average):
            observer.synchronize()
    drawn, state = sampled.sample[:, 0, 0].tolist(), sampled.state_dict()
    return {
        "batches": int(sampled.batches),
        "values": int(state["count"]),
        "drawn": drawn,
        "low": float(average.min_val),
    }


def calibrated_again():
    """Two calibrations of one graph, one that goes on from the saved state, and the sample that they draw."""
    sample, rank = qf.Sample(8), dist.get_rank()
    graph = qf.calibrate(prepared("moving_average"), batches(2, first=2 * rank), sample=sample, progress=False)
    graph.load_state_dict(copy.deepcopy(graph.state_dict()))
    qf.calibrate(graph, batches(2, first=4 + 2 * rank), sample=sample, progress=False)
    return ranges(graph) | {"kept": sorted(x.sum().item() for (batch,) in sample.batches() for x in batch)}


def sampled_again():
    """More examples than a sample keeps."""
    sample = qf.Sample(4)
    signature = Signature.of_graph(prepared())
    for step in range(2):
        sample.add([torch.full((3, 3, 8, 8), 10.0 * step + dist.get_rank())], signature)
        sample.synchronize()
    return {"kept": sorted(x.flatten()[0].item() for (batch,) in sample.batches() for x in batch)}


def mixed_precision():
    """Batch norm of both processes' halves, and a training."""
    torch.manual_seed(0)
    halves, errors = torch.randn(2, 64, 5, 6, 6) * 30 + 200, {}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        mine, whole = halves[dist.get_rank()].to(dtype), halves.flatten(0, 1).to(dtype)
        statistics = [torch.zeros(5), torch.ones(5)] if dtype is not torch.float64 else [torch.zeros(5).double()] * 2
        ours, theirs = ([s.clone() for s in statistics] for _ in range(2))
        with SynchronizedBatchNorm():
            found = torch.ops.aten.batch_norm.default(mine, None, None, *ours, True, 0.1, 1e-5, False)
        expected = F.batch_norm(whole, *theirs, training=True).unflatten(0, (2, 64))[dist.get_rank()]
        assert found.dtype == dtype
        errors[str(dtype)] = max(
            (a - b).abs().max().item() for a, b in zip([found, *ours], [expected, *theirs], strict=True)
        )
    return {"errors": errors, "trained": train(prepared(qat=True), amp=True)}


class Unread(nn.Module):
    """Layers that no output depends on, or only without a gradient, or only the output that the loss leaves out."""

    def __init__(self):
        super().__init__()
        self.small, self.unused, self.shift, self.other = Small(), *(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        y = self.small(x)
        with torch.no_grad():
            shift = self.shift(y)
        return y + shift, self.other(y)


class Chosen(nn.Module):
    """A layer that only chooses."""

    def __init__(self):
        super().__init__()
        self.small, self.choice, self.embedding = Small(), nn.Linear(5, 4), nn.Embedding(4, 5)

    def forward(self, x):
        y = self.small(x)
        return y + self.embedding(self.choice(y).argmax(-1))


def parameters_without_gradients():
    torch.manual_seed(0)
    train(qf.export(Chosen(), (batches(1)[0][0],)).module())
    graph = qf.export(Unread(), (batches(1)[0][0],)).module()
    found = train(graph, loss=lambda outputs, target: F.cross_entropy(outputs[0], target))
    return found | {"weight": graph.get_parameter("small.conv.weight").flatten().tolist()}


def one_fails_before_it_begins():
    """And goes on: what comes next is done by both."""
    graph, said = prepared("moving_average"), []
    for verb in (qf.calibrate, qf.train):
        try:
            verb(None if dist.get_rank() else prepared(qat=True), batches(1), progress=False)
        except qf.QuantflowError as error:
            said.append(str(error))
    qf.calibrate(graph, batches(2, first=2 * dist.get_rank()), progress=False)
    return {"said": said, **ranges(graph)}


def a_choice_by_measured_times():
    rank = dist.get_rank()
    choices = Choice("layer", "float", 0.0, 10, 4.0 * rank), Choice("layer", "int8", 0.1, 0, 1.0)
    table = Table(choices, 100, 5.0 + rank).agreed()
    return {"times": [table.time, *(c.time for c in table.choices)], "noise": [c.noise for c in table.choices]}


CASES = (
    fake_quantizers_of_torchao,
    observed_again,
    calibrated_again,
    sampled_again,
    mixed_precision,
    parameters_without_gradients,
    one_fails_before_it_begins,
    a_choice_by_measured_times,
)
