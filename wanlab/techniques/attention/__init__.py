"""Self-attention of Wan's denoisers: the places where it is computed, its kernels, and how exact they are."""
