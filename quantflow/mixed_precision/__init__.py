"""Mixed precision: a search for the precision of each layer with the least noise under a limit on size or latency."""

from quantflow.mixed_precision.search import search
from quantflow.mixed_precision.search_result import SearchResult

__all__ = ["SearchResult", "search"]
