"""Methods that keep the weights, or the predictions, close to those after earlier tasks."""
