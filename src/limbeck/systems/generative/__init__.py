"""Systems that make the data that they learn from."""
