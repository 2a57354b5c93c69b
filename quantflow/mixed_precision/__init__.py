"""Mixed precision: for each layer the integers, or none, that lose least under a limit on size or latency."""

from quantflow.mixed_precision.search import search
from quantflow.mixed_precision.search_result import SearchResult

__all__ = ["SearchResult", "search"]
