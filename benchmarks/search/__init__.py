"""What a search for the largest batch finds and costs, for every library."""
