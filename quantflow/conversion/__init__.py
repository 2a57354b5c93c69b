"""Conversion: replaces observers and fake quantizers by integer weights and quantize / dequantize pairs."""
