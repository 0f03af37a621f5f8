"""Systems that are networks: what a teacher or a student is built of."""
