"""The memory of a step on a GPU that is not present."""
