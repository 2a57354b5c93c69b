"""Inspection: what a ``.pte`` from anyone holds and whether it runs here, without trusting it; and what is here."""
