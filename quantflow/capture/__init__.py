"""Stage 1: capture of a model as a pre-dispatch ATen program."""
