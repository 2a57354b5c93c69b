"""The ExecuTorch runtime, in this process or in a separate process for programs that may crash it."""

from quantflow.runtime.in_process import execute, load_method, load_program, start, threads
from quantflow.upstream.executorch_runtime import leave_out_exir

__all__ = ["execute", "leave_out_exir", "load_method", "load_program", "start", "threads"]
