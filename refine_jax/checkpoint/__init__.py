"""A run's checkpoints: everything that Orbax does."""
