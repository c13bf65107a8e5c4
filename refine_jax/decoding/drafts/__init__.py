"""Where drafts come from: a file for each kind."""

from refine_jax.decoding.drafts.branches import BranchDrafts
from refine_jax.decoding.drafts.budget import BudgetDrafts, CycleDrafts
from refine_jax.decoding.drafts.kind import DraftKind, Predicted, Rows
from refine_jax.decoding.drafts.ngram import NgramDrafts
from refine_jax.decoding.drafts.noise import NoiseDrafts
from refine_jax.decoding.drafts.tail import TailDrafts

# The option `draft` -> its kind.
KINDS: dict[str, DraftKind] = {
  "tail": TailDrafts(),
  "noise": NoiseDrafts(),
  "ngram": NgramDrafts(),
  "branches": BranchDrafts(),
  "budget": BudgetDrafts(),
  "cycle": CycleDrafts(),
}

__all__ = ["KINDS", "DraftKind", "Predicted", "Rows"]
