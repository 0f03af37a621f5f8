"""Systems that distil models of language."""
