"""From any data to logical batches, and from these to micro-batches."""
