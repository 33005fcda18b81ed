"""BatchNorm in a logical batch that is cut into micro-batches."""
