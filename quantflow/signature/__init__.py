"""The signature of a program: its inputs and outputs."""
