"""Samples in memory-mapped files: the format, its index, what was removed, and the store that writes it."""
