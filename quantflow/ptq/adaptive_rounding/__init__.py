"""AdaRound: weights are rounded up or down as the layer, or the block of layers, needs (arXiv:2004.10568, arXiv:2102.05426)."""
