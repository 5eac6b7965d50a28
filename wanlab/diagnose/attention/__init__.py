"""Attention: which keys each layer and head uses, at which step and expert; its cost; and the kernels for it."""
