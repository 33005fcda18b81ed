"""What a forward pass may change in a model, and how it is restored."""
