"""Private names of torch, torchao and executorch, one file a concern. No other package of quantflow uses such names.

Each file says which names it uses, why, and the versions it was checked with. ``tests/upstream/`` has a test for each file,
which fails if a name moves or changes.
"""
