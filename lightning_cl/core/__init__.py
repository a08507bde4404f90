"""The contract of a method: its questions, the run that asks them, and Lightning's loops."""
