"""Schemes pass through JSON."""

import pytest

import quantflow as qf
from quantizers import Scheme, TensorScheme


def test_scheme_round_trips_through_json_and_refuses_unknown_keys():
    scheme = Scheme(TensorScheme(dynamic=True), TensorScheme(bits=4, symmetric=True, per_channel=True))
    assert Scheme.from_json(scheme.to_json()) == scheme
    with pytest.raises(qf.QuantflowError, match="colour"):
        Scheme.from_json('{"weight": {"colour": 3}}')
    for bad in ({"bits": 16}, {"observer": "crystal_ball"}):
        with pytest.raises(qf.QuantflowError):
            TensorScheme(**bad)
