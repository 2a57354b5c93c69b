"""A slice of executorch's own operator suite, and how a benchmark's cases that crash or hang are told."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import executorch_suite
from isolated import Died, run_isolated

RIGHT = (
    *("adaptive_maxpool2d.test_adaptive_maxpool2d_return_indices", "adaptive_maxpool3d.test_adaptive_maxpool3d_dtype"),
    *("conv3d.test_conv3d_dtype", "convtranspose3d.test_convtranspose3d_groups", "median.test_median_with_indices"),
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
        ("dynamic", "linear.test_linear_dtype", "right"),
        ("float", "abs.test_abs_edge_cases", "skipped"),
    ],
)
def test_other_flows_end_as_they_say(flow, case, end):
    answer = executorch_suite.run_case((flow, case))
    assert executorch_suite.ended(flow, case, answer)["ends"] == end


def test_the_suite_is_there_whole():
    assert len(executorch_suite.cases()) == 467


def _misbehave(task):
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "hang":
        time.sleep(60)
    return task.upper()


def test_what_crashes_or_hangs_is_told_and_the_rest_goes_on():
    answers = dict(run_isolated(_misbehave, ["a", "crash", "hang", "b"], jobs=2, seconds=2.0))
    assert answers == {"a": "A", "b": "B", "crash": Died("crash", "signal 11"), "hang": Died("hang", "no end in 2 s")}
