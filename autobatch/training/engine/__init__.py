"""Compute the gradient of a logical batch in micro-batches, and take the optimizer step."""
