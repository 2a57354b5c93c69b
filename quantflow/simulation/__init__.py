"""Simulation: a captured graph is run node by node, in float, in integers, or both side by side."""
