"""Papers on the detection of objects."""
