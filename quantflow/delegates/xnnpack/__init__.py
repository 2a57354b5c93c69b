"""The XNNPACK delegate: supported operators, partitioner, and rewrites."""
