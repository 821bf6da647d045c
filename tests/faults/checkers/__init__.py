"""What a history is checked for: one file per kind of promise, each a plain function from evidence to findings."""
