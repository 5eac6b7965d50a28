"""Plans in PyTorch: layers replaced, kernels chosen, steps counted."""
