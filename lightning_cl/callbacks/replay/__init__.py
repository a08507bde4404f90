"""Methods that train on samples of earlier tasks: stored, drawn from general data, or written by the model."""
