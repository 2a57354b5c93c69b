"""The patterns of bilinear upsampling are not traced.

Name: ``executorch.backends.xnnpack.partition.graphs.bilinear_2d.get_graphs_dict``, which is replaced.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import contextlib

from quantflow.upstream.replaced import replaced


def no_bilinear_patterns() -> contextlib.AbstractContextManager:
    """No bilinear pattern is traced: each pattern is the undecomposed operator itself, which needs no replacement."""
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d

    return replaced(bilinear_2d, "get_graphs_dict", dict)
