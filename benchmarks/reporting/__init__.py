"""Everything that reads results: the report, the comparison of cards and the README's tables."""
