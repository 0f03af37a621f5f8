"""Policies that learn by reward and from one another."""
