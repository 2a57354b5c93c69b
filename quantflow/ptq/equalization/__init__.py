"""Cross-layer equalization: channels of consecutive layers get similar ranges (Nagel et al. 2019, arXiv:1906.04721)."""
