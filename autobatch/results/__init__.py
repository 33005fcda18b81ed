"""Values that are returned: trials, plans, memory, remedies and plots."""
