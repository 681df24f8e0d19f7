"""Studies: the comparison of all families, and what comes beside it. Everything below is a function they call."""
