"""A slice of executorch's own operator suite, on each flow of the benchmark that drives it."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import executorch_suite
from fuzzing.isolate import Ended

pytestmark = pytest.mark.slow

RIGHT = (
    *("adaptive_maxpool2d.test_adaptive_maxpool2d_return_indices", "adaptive_maxpool3d.test_adaptive_maxpool3d_dtype"),
    *("conv3d.test_conv3d_dtype", "convtranspose3d.test_convtranspose3d_groups", "median.test_median_basic"),
    *("embedding_bag.test_embedding_bag_include_last_offset", "round.test_round_decimals"),
)


@pytest.mark.parametrize("case", RIGHT)
def test_float_cases_are_right(case):
    assert {model["ends"] for model in executorch_suite.run_case(("float", case))} == {"right"}


@pytest.mark.parametrize(
    ("flow", "case", "end"),
    [
        ("int8", "conv2d.test_conv2d_dtype", "right"),
        ("int8", "floor.test_floor_dtype", "nothing"),
        ("dynamic", "linear.test_linear_feature_sizes", "right"),
        ("float", "abs.test_abs_edge_cases", "skipped"),
    ],
)
def test_other_flows_end_as_they_say(flow, case, end):
    models = executorch_suite.run_case((flow, case))
    assert executorch_suite.row_of(Ended((flow, case), "returned", models))["ends"] == end


def test_the_suite_is_there_whole():
    assert len(executorch_suite.cases()) == 467
