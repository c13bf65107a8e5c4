"""Accuracy against tokens per pass, and EleutherAI's harness."""
