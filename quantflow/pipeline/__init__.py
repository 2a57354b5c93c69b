"""The whole flow in one verb, :func:`quantflow.quantize`."""
