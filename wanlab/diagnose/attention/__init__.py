"""Attention: how much of it is needed, by layer, head, step and expert; what it costs; which kernels could do it."""
