"""Methods that decide which parts of a model a task may change."""
