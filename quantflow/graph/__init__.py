"""The captured graph: as a module that trains, in its modes, with its parameters, norms, layout and order."""
