"""The captured graph: a trainable module, its modes, parameters, batch norm, memory layout and rewrites."""
