"""Methods that change the weights after training: interpolation, merging and averaging."""
