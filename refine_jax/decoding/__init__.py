"""Text from a model: loading one, the sampler's programs, what users call and get."""
