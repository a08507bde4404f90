"""The way from files to records to tokens."""
