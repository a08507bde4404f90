"""Methods that give tasks parameters of their own, or decide which part of a model a task may change."""
