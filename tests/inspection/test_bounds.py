"""The memory of a process that looks into programs is bounded."""

import subprocess
import sys


def test_memory_is_bounded():
    code = "from quantflow.inspection.bounds import limit_memory; limit_memory(100, 100); bytearray(2**40)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stderr
    code = "from quantflow.inspection.bounds import limit_memory; limit_memory(100, 100); bytearray(2**28)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
