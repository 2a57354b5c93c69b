"""Calibration: observers see data."""
