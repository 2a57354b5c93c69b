"""Quantization parameters: their computation from ranges, and rounding to integers."""
