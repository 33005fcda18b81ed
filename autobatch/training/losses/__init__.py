"""What training minimizes: one file for each kind of loss."""
