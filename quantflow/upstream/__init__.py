"""Temporary replacements of private functions of torch and executorch."""
