"""Whether a plan did what it says, read from weights, operators, kernels and graphs."""
