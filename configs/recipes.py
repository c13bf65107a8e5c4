"""Recipes live with the schema, in refine_jax/config/recipes.py; configs import them from here."""

from refine_jax.config.recipes import MEANINGS, apply, canonical

__all__ = ["MEANINGS", "apply", "canonical"]
