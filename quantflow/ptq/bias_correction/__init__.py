"""Bias correction: the mean error of each layer is subtracted from its bias (Nagel et al. 2019, arXiv:1906.04721)."""
