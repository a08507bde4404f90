"""Extra passes over data, with the mathematics' view of a model: samples, student, teacher, heads, generation."""
