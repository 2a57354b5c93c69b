"""A graph that was pickled is the graph that it was."""

import pickle

import torch
from networks import Behind

import quantflow as qf
from quantizers import XNNPACKQuantizer


def test_a_pickled_graph_still_takes_any_batch():
    model, x = Behind(lambda y: y.mean((2, 3))).eval(), torch.randn(2, 4, 8, 8)
    graph = pickle.loads(pickle.dumps(qf.export(model, (x,), dynamic_batch=True).module()))
    assert qf.prepare(graph, XNNPACKQuantizer())(torch.randn(5, 4, 8, 8)).shape == (5, 4)
