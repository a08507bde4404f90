"""The steps from files to records, and from records to tokens."""
