"""The order of an epoch: which sample, new or replayed, stands in which batch."""
