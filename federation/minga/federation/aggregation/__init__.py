"""What becomes of updates once their mean is known."""
