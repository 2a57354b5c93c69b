"""Quantization parameters: from a range to scale and zero point, and rounding to integers."""
