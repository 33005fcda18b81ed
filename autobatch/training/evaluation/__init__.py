"""Loss and metrics over data that is not trained on."""
