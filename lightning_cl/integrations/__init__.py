"""Other people's trainers, with the methods of this library."""
