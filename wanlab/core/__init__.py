"""Errors, files, paths, digests and statistics: what every other package stands on."""
