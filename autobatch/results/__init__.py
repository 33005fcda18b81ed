"""Values that public functions return: searches, trainings, plans, memory, remedies, plots."""
