"""Preparation: inserts observers or fake quantizers into the captured graph where annotations ask for them."""
