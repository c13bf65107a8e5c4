"""What an engine's programs are made for: the static part of the options."""

import dataclasses
import functools
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from refine_jax import target
from refine_jax.decoding import device_plans, drafts, plans
from refine_jax.decoding.options import (
  Options,
  chooses,
  default_block_size,
  default_budget,
  default_draft,
)
from refine_jax.decoding.plans import Plan
from refine_jax.decoding.programs import bucket
from refine_jax.errors import UserError
from refine_jax.hf.calibration import PLAIN, Calibration

if TYPE_CHECKING:
  from refine_jax.decoding.loading import Model

# On a GPU, products of fewer rows than this take longer, not less.
_LEAST_ROWS = 16
# Places for EOS ids in a row; more of them are another program.
_EOS_PLACES = 8
# The most tokens that "auto" commits in a pass of a model that was trained without blocks.
_BLOCK_WITHOUT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What an engine's programs are made for.

  Attributes:
    mode: "exact", "fixed" or "threshold"; "ar" is "exact" with blocks of one.
    block: tokens that a pass can commit, block - 1 of them drafts ("threshold" may go on in the
      kind's extra predictions: `most`).
    draft: one of options.DRAFTS.
    budget: tokens a row of a pass with drafts "budget" or "cycle"; 0: the kind's default.
    calibration: what probabilities of drafts are worth.
    plans: of draft "auto": what an engine switches between, of which `draft`, `block` and `budget`
      are one.
    least_most, least_reach: of `most` and `reach`, so that all plans share a State.
    prompt_drafts: whether the prompt's pass makes the first drafts.
    log_probabilities: whether those of answers are kept.
    adapted: whether the adapter of a model that has one takes part.
    random_noise: noise tokens are drawn from the vocabulary; a row's noise token only marks their
      places.
    eos_places: how many EOS ids a row may have.
    sampling: "any" decides in every pass whether a row samples. On a GPU the host would wait for
      that in every pass (0.15 ms of 0.94 on an H200), so there "greedy" and "sampled" are programs
      of their own, of which the second knows greedy rows too.
    engine: of cached.attend_with.
    least_window: see `least_window`.
    mesh: splits heads and caches over "tensor"; None: one device.
  """

  mode: str = "exact"
  block: int = 8
  draft: str = "tail"
  budget: int = 0
  calibration: Calibration = PLAIN
  plans: tuple[Plan, ...] = ()
  least_most: int = 0
  least_reach: int = 0
  prompt_drafts: bool = True
  log_probabilities: bool = False
  adapted: bool = True
  random_noise: bool = False
  eos_places: int = _EOS_PLACES
  sampling: str = "any"
  engine: str = "xla"
  least_window: int = 1
  mesh: Mesh | None = None

  def __hash__(self) -> int:
    """Kept: every step looks programs up by it."""
    return self._hash

  @functools.cached_property
  def _hash(self) -> int:
    return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

  @property
  def window(self) -> int:
    """Tokens a pass runs over: modes that commit unverified tokens run over those once more."""
    needed = 2 * self.block - 1 if self.mode in ("fixed", "threshold") else self.block
    return max(needed, self.least_window)

  @property
  def kind(self) -> drafts.DraftKind:
    """Where drafts come from; a block of one token has none, whatever was asked for."""
    kind = drafts.KINDS[self.draft if self.block > 1 else "tail"]
    return kind.set_up(self.budget, self.calibration)

  @property
  def records(self) -> bool:
    """Whether State.probability is kept."""
    return self.log_probabilities or self.kind.reads_probability

  @property
  def extra_tokens(self) -> int:
    """Tokens a row that the draft kind adds to a pass."""
    return self.kind.extra_tokens(self.block)

  @property
  def tokens(self) -> int:
    """Tokens a row that a pass runs over."""
    return self.window + self.extra_tokens

  @property
  def drafts_of_prompt(self) -> int:
    """Drafts that the prompt's pass makes for the first one."""
    none = self.mode == "fixed" or not self.prompt_drafts
    return 0 if none else self.kind.prompt_drafts(self.block)

  @property
  def width(self) -> int:
    """Tokens that a pass predicts; those that it does not commit may be drafts."""
    return self.block + self.kind.extra_predictions(self.block)

  @property
  def most(self) -> int:
    """Tokens that a pass can commit."""
    return max(self.width if self.mode == "threshold" else self.block, self.least_most)

  @property
  def reach(self) -> int:
    """Places of the cache after the committed tokens that a pass may write."""
    written = self.tokens + (0 if self.extra_tokens else self.block)
    return max(written, self.width, self.least_reach)

  def planned(self, plan: Plan) -> "Settings":
    """The settings of a plan, whose State is that of these; the same object each time."""
    if plan not in self._planned:
      self._planned[plan] = self._of(plan)
    return self._planned[plan]

  @functools.cached_property
  def _planned(self) -> dict[Plan, "Settings"]:
    return {}

  def _of(self, plan: Plan) -> "Settings":
    ar = plan.draft == "ar"
    return dataclasses.replace(
      self,
      draft="tail" if ar else plan.draft,
      block=plan.block,
      budget=plan.budget,
      adapted=not ar,
      plans=(),
    )

  def require(self, wanted: "Settings", eos_ids: int) -> None:
    """Raises UserError where a request that has so many EOS ids wants other programs than these."""
    if dataclasses.replace(wanted, eos_places=self.eos_places) != self:
      raise UserError(
        f"A request's mode, draft, block_size and noise make {wanted}, and the engine has {self}."
      )
    if wanted.eos_places > self.eos_places:
      raise UserError(
        f"A request has {eos_ids} EOS ids, and the engine has room for {self.eos_places};"
        f" make it with eos_ids={eos_ids}."
      )


def static(options: Options) -> tuple:
  """What `settings_for` reads of options."""
  names = (options.mode, options.draft, options.block_size, options.budget)
  return (*names, options.log_probabilities, options.noise_token is None)


def settings_for(model: "Model", options: Options, slots: int, eos_ids: int = 0) -> Settings:
  """The settings of rows with these options.

  Args:
    slots: rows of a pass; with many of them default blocks are smaller.
    eos_ids: how many a row has at most.
  """
  if chooses(options):
    return _auto(model, options, slots, eos_ids)
  trained = model.refinement
  block = options.block_size
  if block is None:
    block = default_block_size(trained, options.mode, options.draft, slots)
  ar = options.mode == "ar"
  block = 1 if ar else int(block)
  draft = "tail" if ar else options.draft or default_draft(trained, options.mode)
  budget, calibration = 0, PLAIN
  if drafts.KINDS[draft].budgeted:
    budget = int(options.budget or default_budget(block, draft, slots))
    block = min(block, budget)  # no run or draft has room beyond
    calibration = (trained and trained.calibration) or PLAIN
  return Settings(
    mode="exact" if ar else options.mode,
    block=block,
    draft=draft,
    budget=budget,
    calibration=calibration,
    log_probabilities=bool(options.log_probabilities),
    # One token a pass needs no drafts, and so no adapter.
    adapted=not ar,
    random_noise=options.noise_token is None and trained is not None and trained.random_noise,
    eos_places=bucket(eos_ids, _EOS_PLACES),
    engine=model.cache_engine,
    least_window=least_window(slots),
    mesh=model.mesh,
  )


def _auto(model: "Model", options: Options, slots: int, eos_ids: int) -> Settings:
  """Settings whose plans are those of this device and so many rows."""
  trained = model.refinement
  block = 1 if trained is None else trained.block_size or _BLOCK_WITHOUT
  block = min(block, options.block_size or block)
  found = plans.chosen(model.plans.get(target.kind(), {}), slots)
  if found is None:
    found = device_plans.built_in(
      slots,
      block,
      adapted=model.adapter is not None,
      trained=trained is not None and trained.block_size is not None,
      **model.size,
    )
  found = tuple(plans.within(plan, block) for plan in found if block > 1 or plan.draft == "ar")
  if all(plan.draft == "ar" for plan in found):  # the same programs as of that mode
    alone = dataclasses.replace(options, mode="ar", draft=None, block_size=None)
    return settings_for(model, alone, slots, eos_ids)
  first = max(found, key=lambda plan: plan.block)
  most = dataclasses.replace(
    options,
    draft=first.draft,
    block_size=first.block,
    budget=first.budget or None if first.draft in ("budget", "cycle") else None,
  )
  base = dataclasses.replace(
    settings_for(model, most, slots, eos_ids),
    calibration=(trained and trained.calibration) or PLAIN,
    # On a CPU an adapter would make a prompt's pass longer than another pass takes.
    prompt_drafts=model.adapter is None or target.platform() != "cpu",
  )
  each = [base.planned(plan) for plan in found]
  return dataclasses.replace(
    base,
    plans=found,
    least_most=max(settings.most for settings in each),
    least_reach=max(settings.reach for settings in each),
  )


def least_window(rows: int) -> int:
  """Tokens a row that a pass should run over at least; those that it does not need are drafts."""
  return max(_LEAST_ROWS // rows, 1) if target.platform() == "gpu" else 1
