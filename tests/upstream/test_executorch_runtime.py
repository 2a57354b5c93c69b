import logging
import subprocess
import sys

from executorch.extension.pybindings import portable_lib

from quantflow.upstream.executorch_runtime import thread_count

RUNS_WITHOUT_EXIR = """
import sys
from quantflow.upstream.executorch_runtime import leave_out_exir
leave_out_exir()
import executorch.kernels.quantized
from executorch.runtime import Runtime
assert "quantized_decomposed::quantize_per_tensor.out" in Runtime.get().operator_registry.operator_names
assert not hasattr(sys.modules["executorch.exir"], "to_edge")
"""


def test_the_runtime_has_threads():
    assert thread_count() >= 1


def test_a_missing_count_is_told(monkeypatch, caplog):
    monkeypatch.delattr(portable_lib, "_threadpool_get_thread_count")
    with caplog.at_level(logging.INFO, "quantflow"):
        assert thread_count() == 0
    assert "_threadpool_get_thread_count" in caplog.text


def test_the_runtime_starts_without_exir():
    subprocess.run([sys.executable, "-c", RUNS_WITHOUT_EXIR], check=True)
