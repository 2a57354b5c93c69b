"""Conversion: observed and trained ranges become integers."""
