"""What a training step costs beside the plain loop and beside other libraries."""
