"""What a backend runs in float, as a table: the other half of a quantizer's rules, for operators that no rule takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Node

# Whether a backend runs a node of this operator in float.
Runs = Callable[[Node], bool]


@dataclass(frozen=True)
class FloatKernels:
    """The float operators of a backend, in core ATen and beyond.

    Attributes:
        runs: What it runs, by operator, and the check on the node that it asks for. Views count as copies.
        whole: Of these, what lowering does not decompose where the check agrees.
        between: Of these, what it runs in integers wherever integers stand around it, asked or not.
        dtypes: Which tensors it takes, all of one dtype.
    """

    runs: Mapping[OpOverload, Runs]
    whole: frozenset[OpOverload]
    between: frozenset[OpOverload] = frozenset()
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.float16})

    def run(self, node: Node) -> bool:
        """Whether the backend runs ``node``, whose ``val`` is a fake tensor of known shape."""
        check = self.runs.get(node.target)  # type: ignore[arg-type]
        if check is None:
            return False
        values = [given.meta["val"] for given in (*node.all_input_nodes, node)]
        first = [val[0] if isinstance(val, (tuple, list)) else val for val in values]  # what follows it are indices
        dtypes = {val.dtype for val in first}
        return len(dtypes) == 1 and dtypes <= self.dtypes and all(val.numel() for val in first) and check(node)
