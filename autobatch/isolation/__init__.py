"""Functions that run in another process, which may die without harm to this one."""
