"""What a batch means in each domain."""
