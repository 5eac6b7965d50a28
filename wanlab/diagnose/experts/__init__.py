"""The experts of a model: when each runs, the cost of a switch, and the difference of their predictions."""
