"""Several processes as one: they agree, whatever their shares are, and one that is gone is named by all others."""

import math

import pytest
import torch
from process_networks import batches
from processes import outcomes

from quantflow.observers import MinMaxObserver

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told():
    """What both processes tell of each case, by rank."""
    found = {}
    for outcome in outcomes("process_cases.py"):
        found.setdefault(outcome.pop("case", "start"), {})[outcome.pop("rank")] = outcome
    assert "start" not in found, found["start"]
    return found


def both(told, case):
    first, second = told[case][0], told[case][1]
    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    return first, second


def agree(first, second):
    """The ranges, scales and figures of both are the same to the bit."""
    assert first.keys() == second.keys()
    for name in first.keys() - {"said"}:
        assert first[name] == second[name], name


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unequal_shares", "rank 1: its share of the data has 3 batches, rank 0 has 5"),
        ("unequal_shares_without_length", "rank 0: its share of the data has 2 batches, and more has rank 1"),
    ],
)
def test_an_epoch_ends_with_the_shortest_share(told, case, words):
    first, second = both(told, case)
    agree(first, second)
    assert words in first["said"][0]
    assert not second["said"]  # rank 0 speaks for all
    assert len(first["loss"]) == 2


def test_they_stop_in_the_same_epoch_by_the_mean_figure(told):
    first, second = both(told, "validate_differs")
    agree(first, second)
    assert first["metric"] == [-1.0, -2.0, -3.0]  # of 1, 2, 3 and -3, -6, -9, after a start without ranges
    assert first["best"] == 0


@pytest.mark.parametrize("case", ["calibration_of_unequal_shares", "calibration_with_patience"])
def test_a_moving_average_is_that_of_all_batches(told, case):
    first, second = both(told, case)
    agree(first, second)
    x = torch.stack([x for x, _ in batches(7)])
    low, high = x.flatten(1).amin(1).mean(), x.flatten(1).amax(1).mean()
    if case == "calibration_of_unequal_shares":
        assert first["quantization.x.count"] == 7
        assert first["quantization.x.min_val"] == pytest.approx(low.item(), rel=1e-6)
        assert first["quantization.x.max_val"] == pytest.approx(high.item(), rel=1e-6)


def test_training_starts_from_what_all_saw(told):
    first, second = both(told, "calibration_before_training")
    agree(first, second)
    observer = MinMaxObserver()
    for x, _ in batches(4):
        observer(x)
    assert first["watching"]["quantization.x"] == observer.max_val.item()
    assert first["quantization.x.scale"] == observer.calculate_qparams()[0].item()


def test_what_is_no_number_in_one_process_is_none_in_all(told):
    for outcome in both(told, "no_number_in_one_process"):
        assert "infinite or not a number" in outcome["said"]


def test_a_share_without_data_is_named_in_all(told):
    for outcome in both(told, "one_process_without_data"):
        assert "rank 0: its share of the calibration set is empty" in outcome["said"]


def test_a_grid_of_each_inputs_own_asks_nobody(told):
    assert all(outcome["finite"] for outcome in both(told, "rank_0_looks_alone"))


def test_a_batch_of_nothing_counts_where_others_have_some(told):
    for outcome in both(told, "nothing_in_one_process"):
        assert outcome["range"] == [-2.0, 3.0, 2]


def test_observers_of_torchao_are_refused_before_any_data(told):
    for outcome in both(told, "figures_of_torchao"):
        assert "quantization.x: what HistogramObserver of torchao saw" in outcome["said"]


def test_fake_quantizers_of_torchao_are_refused_in_training(told):
    for outcome in both(told, "fake_quantizers_of_torchao"):
        assert "[train] quantization.x: what MovingAverageMinMaxObserver of torchao saw" in outcome["said"]


def test_what_all_held_before_counts_once(told):
    agree(*both(told, "observed_again"))
    found = told["observed_again"][0]
    assert (found["batches"], found["values"]) == (4, 16)
    assert found["drawn"] == [0, 1, 10, 11]
    assert found["low"] == pytest.approx(0.5)


def test_calibrations_one_after_another_are_one_of_all_batches(told):
    agree(*both(told, "calibrated_again"))
    found, x = told["calibrated_again"][0], torch.stack([x for x, _ in batches(8)])
    assert found["quantization.x.count"] == 8
    assert found["quantization.x.min_val"] == pytest.approx(x.flatten(1).amin(1).mean().item(), rel=1e-6)
    assert len(set(found["kept"])) == 8


def test_a_sample_drawn_again_holds_both_draws_of_both(told):
    agree(*both(told, "sampled_again"))
    assert told["sampled_again"][0]["kept"] == [0, 1, 10, 11]


def test_batch_norm_in_half_precision_is_that_of_all_examples(told):
    first, second = both(told, "mixed_precision")
    agree(first["trained"], second["trained"])
    for dtype, error in {**first["errors"], **second["errors"]}.items():
        assert error < (1e-10 if "64" in dtype else 0.01), dtype


def test_parameters_without_a_gradient_stay_and_the_others_learn(told):
    agree(*both(told, "parameters_without_gradients"))


def test_one_that_fails_before_it_begins_is_named_and_may_go_on(told):
    first, second = both(told, "one_fails_before_it_begins")
    agree(first, second)
    for verb, words in zip(first["said"], ("the graph was not prepared", "NoneType is no captured graph"), strict=True):
        assert "rank 1: it failed" in verb
        assert words in verb
    assert first["quantization.x.count"] == 4


def test_a_choice_by_measured_times_is_made_by_their_mean(told):
    for outcome in both(told, "a_choice_by_measured_times"):
        assert outcome["times"] == [5.5, 2.0, 1.0]
        assert outcome["noise"] == pytest.approx([0.0, 0.1])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other_options", "rank 1: it has another graph, optimizer or options than rank 0"),
        ("checkpoints_that_one_process_sees", "rank 1: it resumes at step 0, rank 0 at 2"),
        (
            "a_device_that_the_group_does_not_carry",
            "cpu: the group's backend (cuda:nccl) takes no tensors of this device",
        ),
    ],
)
def test_what_can_not_train_together_is_named(told, case, words):
    for outcome in both(told, case):
        assert words in outcome["said"]


def test_collectives_take_tensors_of_the_groups_device(told):
    first, second = both(told, "guarded")
    agree(first, second)
    assert first["refused"]  # the guard itself bites
    assert "all_reduce" in first["used"]
    assert all(math.isfinite(scale) for scale in [first["quantization.x.scale"]])


FAILURES = {
    # where, how, who: what the others say of it
    "step-killed-1": "no sign of life",
    "step-killed-0": "the store by which the processes talk is gone",
    "data-hung-1": "no answer within 16 s",
    "step-hung-1": "it hangs",
    "step-failed-1": "it failed: ValueError: a fault of its own",
    "validate-failed-2": "it failed: ValueError: a fault of its own",
    "calibrate-killed-1": "no sign of life",
}


@pytest.fixture(scope="module")
def failures():
    """What the processes tell of each failure."""
    found = outcomes("process_failures.py", *FAILURES)
    return {case: [outcome for outcome in found if outcome.get("case") == case] for case in FAILURES}


@pytest.mark.parametrize("case", FAILURES)
def test_one_that_goes_wrong_is_named_by_all_others(failures, case):
    where, _, culprit = case.split("-")
    others = [outcome for outcome in failures[case] if "own" not in outcome]
    assert {outcome["rank"] for outcome in others} == {0, 1, 2} - {int(culprit)}
    for outcome in others:
        assert outcome["node"] == f"rank {culprit}", outcome
        assert outcome["stage"] == ("calibrate" if where == "calibrate" else "train")
        assert FAILURES[case] in outcome["reason"]
        assert outcome["seconds"] < 60
