"""Loss and metrics over data that the model does not train on."""
