"""Data: batches as models take them, and the sample of them that is kept."""
