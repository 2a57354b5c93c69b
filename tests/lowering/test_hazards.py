"""Every known hazard of the stock path ends in a right program or in a named error."""

import pytest
from hazards import HAZARDS, Quantflow

import quantflow as qf

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:.*computes in bfloat16:quantflow.QuantflowWarning")
@pytest.mark.filterwarnings("ignore:.*left to portable kernels:quantflow.QuantflowWarning")
@pytest.mark.parametrize("name", HAZARDS)
def test_ends_right_or_in_a_named_error(name):
    hazard = HAZARDS[name]
    if hazard.error:
        with pytest.raises(qf.QuantflowError, match=hazard.error):
            hazard.law(Quantflow())
    else:
        assert hazard.law(Quantflow()) >= hazard.least
