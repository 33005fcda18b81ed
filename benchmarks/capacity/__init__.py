"""The largest batch of each model on this device, and how fast each size trains."""
