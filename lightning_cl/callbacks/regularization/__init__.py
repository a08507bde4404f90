"""Methods that keep the weights, or what the model says, close to what earlier tasks left."""
