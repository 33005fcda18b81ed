"""What the command line does: names to objects, runs, reports."""
