"""The state of a process that a search may change: taken before, and put back afterwards."""
