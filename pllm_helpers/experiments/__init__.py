"""A paper's table, figure or claim as one function each; notebooks and sweeps call these."""
