"""The experts of a model: which runs when, what a switch costs, how far they disagree."""
