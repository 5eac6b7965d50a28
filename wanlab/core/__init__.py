"""Base of every other package: errors, files, paths, digests, number formats, statistics and YAML with line numbers."""
