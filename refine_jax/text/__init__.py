"""Text to token ids and back: chat templates, tokenizers, growing answers. Knows no JAX."""
