"""What stands beside a run: its processes, its memory and its output, and an end to each that grows too far."""
