"""Systems whose training data stay with clients."""
