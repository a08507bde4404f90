"""Extra passes over data, and access to a model's parts: samples, student, teacher, heads, generation."""
