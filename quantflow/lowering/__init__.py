"""Lowering: core ATen, the edge dialect with its delegates, and the ExecuTorch program, checked on the runtime."""
