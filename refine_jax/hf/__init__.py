"""Hugging Face's formats, both ways: config.json, safetensors, tokenizer files."""
