"""Preparation: annotations become observers or fake quantizers in the captured graph."""
