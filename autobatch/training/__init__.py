"""Taking the undivided batch's step in pieces."""
