"""The whole flow in one call: :func:`quantflow.quantize`."""
