"""The order of an epoch: it assigns each sample, new or replayed, to a batch."""
