"""Prompts in, answers out, in a terminal or a pipe."""
