"""Studies: questions about training answered by runs that differ in one thing, on several seeds, within a budget."""
