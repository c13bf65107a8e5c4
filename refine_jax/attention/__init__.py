"""Attention implementations: over packed rows in training, over a cache in decoding."""
