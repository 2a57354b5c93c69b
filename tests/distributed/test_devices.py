"""Several processes on the devices that are there: gloo on CPUs, NCCL on GPUs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from processes import HERE

pytestmark = pytest.mark.slow

GPUS = torch.cuda.device_count()
needs_gpu = pytest.mark.skipif(not GPUS, reason="needs a GPU")


@pytest.mark.parametrize(
    "backend", ["gloo", pytest.param("cpu:gloo,cuda:nccl", marks=needs_gpu), pytest.param("nccl", marks=needs_gpu)]
)
def test_processes_end_alike(backend):
    count = min(2, GPUS) if backend != "gloo" else 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if backend == "gloo" else {}
    environment = {**os.environ, **hidden, "OMP_NUM_THREADS": "1"}
    script = [str(HERE / "device_cases.py"), backend]
    ended = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = sorted(
        (json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")), key=lambda t: t["rank"]
    )
    assert len(told) == count
    for outcome in told:
        assert outcome["device"] == ("cpu" if backend == "gloo" else "cuda")
        assert backend in outcome["backend"]
        assert outcome["range"] == [-float(count), 1.0 + count]
        assert outcome["metric"] == [(count - 1) / 2] * 2
        assert all(abs(figure - 1.6) < 0.5 for figure in outcome["loss"])
        for part in ("starts", "state"):
            assert outcome[part] == told[0][part]
