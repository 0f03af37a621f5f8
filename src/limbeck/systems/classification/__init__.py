"""Systems that distil image classifiers."""
