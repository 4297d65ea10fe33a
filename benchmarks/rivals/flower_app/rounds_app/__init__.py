"""A Flower app that only moves weights."""
