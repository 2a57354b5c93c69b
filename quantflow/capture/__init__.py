"""Stage 1: a model is captured as a pre-dispatch ATen program."""
