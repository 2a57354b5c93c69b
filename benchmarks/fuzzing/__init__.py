"""A differential fuzzer: random networks, the four paths from each to a program, and verdicts by measurement."""
