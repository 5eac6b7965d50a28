"""What layers are really fed: recordings, ranges, and their caches."""
