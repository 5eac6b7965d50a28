"""Sweeps: many runs from one grid, on this machine or on a cluster, with the truth about each of them."""
