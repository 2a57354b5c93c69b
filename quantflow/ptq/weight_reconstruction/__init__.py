"""Weight reconstruction: weights and biases that reconstruct_weights the error of quantization, layer by layer."""
