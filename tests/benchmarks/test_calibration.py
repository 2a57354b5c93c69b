"""The benchmark of calibration counts batches."""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import calibration


def test_calibration_counts_batches_and_takes_float_for_one(monkeypatch):
    monkeypatch.setattr(calibration, "MEMORY_BATCHES", ())  # a process for each would take a minute
    monkeypatch.setattr(calibration, "VARIANTS", {k: calibration.VARIANTS[k] for k in ("float", "quantflow")})
    rows = calibration.measure(
        argparse.Namespace(model="squeezenet1_1", batch_size=2, batches=3, image_size=64, repeats=2)
    )
    assert rows["float"]["ratio"] == 1
    assert rows["float"]["batches"] == 3
    assert 1 <= rows["quantflow"]["batches"] <= 3
    assert rows["quantflow"]["calibrate_s"] > 0
    assert rows["quantflow"]["convert_s"] > 0
