"""HOW an edit is executed: the reference, one ordered table of exact ways, and the kernels under them. Knows no model and no method."""
