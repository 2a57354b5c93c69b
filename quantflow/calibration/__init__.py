"""Calibration: runs data through a prepared graph, so that its observers measure ranges."""
