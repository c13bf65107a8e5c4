"""A run: start, step, loop, and what it writes."""
