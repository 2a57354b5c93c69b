"""SmoothQuant: scales outliers of activations into the weights that read them (Xiao et al. 2022, arXiv:2211.10438)."""
