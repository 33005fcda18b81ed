"""Finding the largest size that really runs."""
