"""Networks with fewer bits, weights or filters."""
