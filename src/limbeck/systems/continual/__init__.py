"""Systems that learn one task after another."""
