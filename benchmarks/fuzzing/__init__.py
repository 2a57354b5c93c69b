"""A differential fuzzer: random networks, four paths from a network to a program, and measured outcomes."""
