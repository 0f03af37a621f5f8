"""Systems for tasks with an answer for every pixel."""
