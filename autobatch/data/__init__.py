"""Read data of any kind, and regroup it into logical batches and micro-batches."""
