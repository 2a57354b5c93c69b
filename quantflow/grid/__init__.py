"""The integer grid: from a range to scale and zero point, rounding to it, and what is held on it."""
