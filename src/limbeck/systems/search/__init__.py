"""Systems that search for an architecture."""
