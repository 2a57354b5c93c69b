"""Weight reconstruction: weights and biases that compensate the error of quantization, layer by layer."""
