"""Inspection of untrusted ``.pte`` files, of whether they run here, and of the installed environment."""
