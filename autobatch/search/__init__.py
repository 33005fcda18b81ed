"""The search for the largest size that really runs."""
