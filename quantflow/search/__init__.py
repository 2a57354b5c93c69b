"""Mixed precision: for each layer the integers, or none, that lose least under a limit on size or latency."""

from quantflow.search.found import Found
from quantflow.search.search import search

__all__ = ["Found", "search"]
