"""Rewrites at their limits: sizes, dtypes and numbers that they do not take, batches of other sizes, and failures."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.delegates.portable_rewrites import PORTABLE_REWRITES
from quantflow.graph.aten import op
from quantflow.graph.rewrites import PRODUCT_REWRITES, REWRITES, VOLUME_REWRITES, rewrite

IMAGE = torch.randn(3, 8, 6, 6) * 3
VOLUME = torch.randn(2, 3, 4, 5, 5)
TABLES = ({**REWRITES, **VOLUME_REWRITES, **PRODUCT_REWRITES}, PORTABLE_REWRITES)
KERNEL, POSITIONS = torch.randn(4, 3, 3, 3, 3), torch.randn(1, 4, 4, 5, 5)
PLACES = torch.tensor([1, 2, 5, 2, 3, 4])
INTEGERS = torch.randint(-9, 9, (2, 3, 4, 4))
# Where a rewrite is another than elsewhere, or none; the dimension that varies, where one does.
BOUNDARIES = {
    "channels that vary": (lambda x: F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 3), IMAGE, 1),
    "a number beyond float32": (lambda x: x * 1e39 - x * 1e-42, IMAGE, None),
    "numbers beyond float16": (lambda x: x * 1e5 + x * 1e-8, IMAGE.half() / 1e3, None),
    "maxima of no window": (lambda x: F.adaptive_max_pool2d(x, (0, 2)), IMAGE, None),
    "maxima within padding": (
        lambda x: F.max_pool3d(x, 2, 1, 1, 3, return_indices=True),
        torch.randn(1, 1, 2, 2, 2),
        None,
    ),
    "no volume": (
        lambda x: F.conv_transpose3d(x, KERNEL.transpose(0, 1), padding=(3, 0, 0)),
        VOLUME,
        None,
    ),
    "no batch": (lambda x: F.max_pool3d(F.conv3d(x, KERNEL), 2), VOLUME[:0], None),
    "bags of nothing": (
        lambda x: F.embedding_bag(torch.zeros(0, dtype=torch.long), x, torch.zeros(2, dtype=torch.long), mode="max"),
        IMAGE[0, 0],
        None,
    ),
    "bags that end before their indices, padded": (
        lambda x: F.embedding_bag(PLACES, x, torch.tensor([0, 2, 4]), include_last_offset=True, padding_idx=2),
        IMAGE[0, 0],
        None,
    ),
    "bags that end before their indices": (
        lambda x: F.embedding_bag(PLACES, x, torch.tensor([0, 2, 4]), include_last_offset=True, mode="sum"),
        IMAGE[0, 0],
        None,
    ),
    "bags that end before their indices, float64": (
        lambda x: F.embedding_bag(PLACES, x, torch.tensor([0, 2, 4]), include_last_offset=True, mode="sum"),
        IMAGE[0, 0].double(),
        None,
    ),
    "bags of infinite rows": (
        lambda x: F.embedding_bag(PLACES, 1 / x.relu(), torch.tensor([0, 1, 4]), mode="sum"),
        IMAGE[0, 0],
        None,
    ),
    "sorted truths": (lambda x: torch.sort(x > 0, 1, descending=True)[0], IMAGE, None),
    "places of sorted values": (lambda x: torch.argsort(x, 1, descending=True), IMAGE, None),
    "volumes with positions": (lambda x: F.conv3d(x, KERNEL, padding=1) + POSITIONS, VOLUME, None),
    "volumes with positions, any batch": (lambda x: F.conv3d(x, KERNEL, padding=1) + POSITIONS, VOLUME, 0),
    "hardsigmoid of a number": (lambda x: F.hardsigmoid(x.mean()), IMAGE, None),
    "decimals of a number": (lambda x: torch.round(x.sum(), decimals=2), IMAGE, None),
    "whole averages": (lambda x: F.avg_pool2d(x, 2), INTEGERS, None),
    "whole averages over volumes": (lambda x: F.avg_pool3d(x, 2), INTEGERS, None),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_boundaries(name):
    function, x, varies = BOUNDARIES[name]

    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    dynamic = None if varies is None else ({varies: torch.export.Dim.DYNAMIC},)
    graph = torch.export.export(Model(), (x,), dynamic_shapes=dynamic).module()
    for table in TABLES:
        torch.testing.assert_close(rewrite(copy.deepcopy(graph), table)(x), function(x))


def test_positions_are_added_to_any_batch():
    """Also where the graph was captured with a batch of one, as they have."""
    model = nn.Conv3d(3, 4, 3, padding=1)
    model.register_buffer("positions", POSITIONS)
    model.register_forward_hook(lambda m, args, out: out + m.positions)
    graph = rewrite(qf.export(model, (VOLUME[:1],)).module(), VOLUME_REWRITES)
    assert torch.allclose(graph(VOLUME), model(VOLUME), atol=1e-5)


def test_a_rewrite_that_fails_leaves_its_node():
    model = nn.Conv3d(3, 4, 3, padding=1)
    graph = qf.export(model, (VOLUME,)).module()
    code, weight = graph.code, graph.get_parameter("weight")

    def fails(module, node):
        assert VOLUME_REWRITES[op(node)](module, node) is not None
        raise ValueError("no")

    with pytest.warns(qf.QuantflowWarning, match=r"conv3d.*stays: ValueError: no"):
        rewrite(graph, {torch.ops.aten.conv3d.default: fails})
    graph.recompile()
    assert graph.code == code
    assert graph.get_parameter("weight") is weight
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(graph(VOLUME), model(VOLUME))


MOVES = {
    "unsqueeze": lambda x: x.unsqueeze(0),
    "unsqueeze and back": lambda x: torch.relu(x.unsqueeze(0)).squeeze(0) + 1,
    "squeeze": lambda x: x.unsqueeze(1).unsqueeze(0).squeeze((0, 2)),
    "permuted": lambda x: x.permute(1, 2, 3, 0).unsqueeze(2),
    "select": lambda x: x.transpose(0, 1)[2] + x.movedim(0, -1)[2].movedim(-1, 0),
    "unbind": lambda x: torch.stack([p * 2 for p in x.transpose(0, 1).unbind(0)], 1),
    "unflatten": lambda x: x.unflatten(1, (2, 4)).transpose(0, 2).unflatten(1, (2, 1)).unsqueeze(1),
    "rows of a table": lambda x: F.embedding((x > 0).long(), KERNEL[0, 0, 0]).unsqueeze(0),
    "one hot": lambda x: F.one_hot((x > 0).long(), 2).unsqueeze(2) * 1.0,
    "mean": lambda x: x.permute(1, 2, 3, 0).mean(1).unsqueeze(0),
    "without the batch": lambda x: (x.sum(0) * 0 + 1).unsqueeze(1) + x[:1].squeeze(0).unsqueeze(1),
}


@pytest.mark.parametrize("name", MOVES)
def test_another_batch_than_that_of_the_example(name):
    class Model(nn.Module):
        def forward(self, x):
            return MOVES[name](x)

    graph = rewrite(qf.export(Model(), (IMAGE,)).module(), REWRITES)
    assert not {op(n) for n in graph.graph.nodes} & {torch.ops.aten.unsqueeze.default, torch.ops.aten.select.int}
    for batch in (1, 3, 5):
        x = torch.randn(batch, 8, 6, 6)
        torch.testing.assert_close(graph(x), MOVES[name](x))
