"""Search for the largest batch size that runs."""
