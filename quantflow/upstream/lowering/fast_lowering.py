"""Lowering through executorch in a quarter to half of its time, to the same bytes.

While :func:`fast_lowering` is active, some names of torch and executorch are replaced by functions that give the same result
with less work. Each file of this folder has one such patch:

- ``code_generation.py``: the code of a graph is generated when it is called, not after each edit;
- ``bilinear_patterns.py``, ``attention_patterns.py``: patterns that the graph can't match are not traced;
- ``decomposition.py``: a program is decomposed only if something is left to decompose, and then by a faster method
  (``quantflow/upstream/decomposition.py``);
- ``verification.py``: the verifier takes the operators' results from the graph instead of running it again;
- ``retraces.py``: a pass that would retrace a graph without changing it copies the graph instead, and operators run on fake
  tensors only for new inputs (23 of the 25 retraces of MobileNetV2 change nothing);
- ``topological_order.py``: a graph is sorted by moving its nodes;
- ``delegates.py``: the outputs of a delegate are read from its graph, not traced through the whole graph.

Nothing is replaced for versions that were not measured, if a name is missing, or if the environment variable
``QUANTFLOW_FAST_LOWERING`` is 0; executorch's own lowering runs then, and the logger ``quantflow`` tells why at level INFO. The
replaced names are global, so one lowering at a time is fast and others wait for it.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from quantflow.errors import QuantflowWarning
from quantflow.upstream.decomposition import fast_decomposition
from quantflow.upstream.lowering.attention_patterns import attention_patterns_if_possible
from quantflow.upstream.lowering.bilinear_patterns import no_bilinear_patterns
from quantflow.upstream.lowering.code_generation import code_when_called
from quantflow.upstream.lowering.decomposition import decompose_once
from quantflow.upstream.lowering.delegates import delegates_by_values
from quantflow.upstream.lowering.retraces import copied_retraces
from quantflow.upstream.lowering.topological_order import sort_in_place
from quantflow.upstream.lowering.verification import verify_by_values
from quantflow.upstream.replaced import exclusively
from quantflow.upstream.versions import obstacle

T = TypeVar("T")

_log = logging.getLogger("quantflow")
_PATCHES = (
    code_when_called,
    no_bilinear_patterns,
    attention_patterns_if_possible,
    fast_decomposition,
    decompose_once,
    verify_by_values,
    copied_retraces,
    sort_in_place,
    delegates_by_values,
)
_FOLDER = os.path.dirname(__file__) + os.sep
# Functions of this folder that only call the function that they replace.
_PASSING = frozenset({"run_fast", "call", "call_if_possible", "run_decompositions", "forward"})


@contextlib.contextmanager
def fast_lowering() -> Iterator[bool]:
    """Make executorch's lowering fast within the context; yields whether it is fast."""
    with exclusively(), contextlib.ExitStack() as stack:
        reason = obstacle() or _enter(stack)
        if reason is not None:
            _log.info("fast lowering is not used: %s", reason)
        yield reason is None


def run_fast(lower: Callable[[], T]) -> T:
    """Run ``lower()`` fast. A failure that executorch did not report itself is retried without the replacements and warned of.

    Raises:
        Exception: the same exception as executorch without the replacements.
    """
    with fast_lowering() as fast:
        try:
            return lower()
        except Exception as error:
            if not fast or _is_refusal(error):
                raise
            failure = f"{type(error).__name__}: {str(error)[:300]}"
    made = lower()
    reason = f"fast lowering failed, so executorch's own ran, which takes two to four times as long ({failure})"
    remedy = "the program is the same; report the message and the model to quantflow"
    warnings.warn(QuantflowWarning("edge", reason, node="fast lowering", remedy=remedy), stacklevel=3)
    return made


def _is_refusal(error: BaseException) -> bool:
    """Whether executorch raised ``error`` itself, with no function of this folder involved."""
    links = [error]
    while (below := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(below)
    frames = [[frame for frame, _ in traceback.walk_tb(link.__traceback__)] for link in links]
    codes = (frame.f_code for walked in frames for frame in walked)
    ours = {code.co_name for code in codes if code.co_filename.startswith(_FOLDER)}
    said_by = frames[-1][-1].f_globals.get("__name__", "") if frames[-1] else ""
    slips = (LookupError, AttributeError, TypeError, AssertionError, NameError)  # raised for an unexpected graph
    return ours <= _PASSING and said_by.startswith("executorch.") and not isinstance(links[-1], slips)


def _enter(stack: contextlib.ExitStack) -> str | None:
    """Enter all patches, or none. Returns the reason for none."""
    try:
        for patch in _PATCHES:
            stack.enter_context(patch())
    except (ImportError, AttributeError) as error:
        stack.close()
        return f"a name is missing: {error}"
    return None
