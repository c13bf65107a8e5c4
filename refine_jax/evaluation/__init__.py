"""Accuracy beside tokens a pass, and EleutherAI's harness."""
