"""The training run: builds everything, then loops. The only place that knows all the parts."""

import functools
from pathlib import Path

import jax
import numpy as np

from refine_jax import compile_cache, files, interrupt, lock, processes, sharding
from refine_jax.checkpoint.checkpointer import Checkpointer
from refine_jax.config import Config
from refine_jax.errors import UserError
from refine_jax.objective import noise
from refine_jax.training import debug_log, duties, metrics, startup, train_step
from refine_jax.training.choices import choose_forward, flops_per_token
from refine_jax.training.data_plan import plan_data
from refine_jax.training.flops import peak_flops
from refine_jax.training.frozen import load_frozen
from refine_jax.training.problems import Problems
from refine_jax.training.profile import Profile
from refine_jax.training.source import read_source
from refine_jax.training.workdir import check_held, check_workdir, hold, prepare_workdir


def run(config: Config, workdir: str) -> int:
  """Trains to the end, from wherever the run stands (startup.init_or_restore says from where).

  Returns:
    the process's exit status: 0, or 128 + the signal that ended the run after a checkpoint.

  Raises:
    UserError: what a user can mend.
  """
  place = files.local_path(workdir, "--workdir").absolute()
  noise.from_config(config.noise)  # refuses, before anything is done, what the kind cannot do
  with processes.together():
    check_workdir(place, config)
  with hold(place) as held:
    return _run(config, place, held)


def _run(config: Config, workdir: Path, held: lock.Lock | None) -> int:
  compile_cache.enable()
  mesh = sharding.make_mesh(config.mesh)
  source = read_source(config)
  sharding.check_fit(
    mesh, config.optim, source.model.heads, source.model.kv_heads, config.data.max_length
  )
  plan = plan_data(config, source, mesh)
  forward = choose_forward(config, source.model, mesh, plan)
  step_config = startup.make_step_config(config, source, plan)
  record = startup.run_record(config, step_config, plan)
  frozen, fingerprint = load_frozen(source, forward) if forward.adapter else (None, None)
  identity = startup.identity(source.model, forward.adapter, fingerprint)
  iterator = plan.train_iterator()
  checkpointer = Checkpointer(workdir, max_to_keep=config.checkpoint.max_ckpt_to_keep)
  try:
    own = checkpointer.has_any()
    state, origin = startup.init_or_restore(
      config, source, mesh, checkpointer, iterator, record, identity
    )
    # Of a checkpoint that another run's workdir holds, that run does it.
    missing = _missing(config, workdir, plan, int(state.step)) if own else None
    if int(state.step) >= plan.total_steps and not missing:
      print(f"step {int(state.step)}: this run is complete; nothing left to do.")
      return 0
    # After the start: a workdir of another model has been refused by now, and is left as it was.
    with processes.together():
      changed = prepare_workdir(
        workdir, config, source, step_config.noise_token, step=int(state.step)
      )
    lines = startup.describe(config, source, plan, step_config, forward, state, origin, frozen)
    for line in lines + changed:
      print(line)
    saved = (checkpointer, iterator, record, identity)
    loop = _Loop(config, workdir, held, source, plan, step_config, forward, frozen, saved)
    return loop.run(state, missing)
  finally:
    checkpointer.close()


def _missing(config, workdir, plan, step):
  validation = plan.validation is not None
  return duties.missing(config, workdir, step, total=plan.total_steps, validation=validation)


class _Loop:
  """One method for each thing that happens at a step."""

  def __init__(self, config, workdir, held, source, plan, step_config, forward, frozen, saved):
    self.config, self.workdir, self.held = config, workdir, held
    self.source, self.plan, self.frozen = source, plan, frozen
    self.step_config, self.forward, self.mesh = step_config, forward, forward.mesh
    self.checkpointer, self.iterator, self.record, self.identity = saved
    self.total = step_config.total_steps
    bound = {"step_config": step_config, "forward": forward}
    whole = sharding.replicated(self.mesh)  # so that every process can read what they give
    jit = functools.partial(jax.jit, out_shardings=whole)
    self.eval_step = jit(functools.partial(train_step.eval_step, **bound))
    self.debug_rounds = jit(functools.partial(train_step.debug_rounds, **bound))
    length = plan.train.mean_length
    flops = flops_per_token(config, source.model, plan, length, step_config)
    self.problems: Problems | None = None
    if config.eval.generate_every:
      self.problems = Problems(config, source.model, workdir / "model", forward.dtype)
    self.throughput = metrics.Throughput(flops, peak_flops(), self.mesh.size)
    self.profile = Profile(workdir, config.log)

  def run(self, state, missing) -> int:
    """Trains from `state`, after what an earlier process left undone at its step."""
    first = int(state.step)
    writers = metrics.Writers(
      self.workdir, self.config.log, self.config.to_dict(), first=first, total=self.total
    )
    try:
      if 0 < self.config.log.profile_steps[1] <= first:
        writers.note(f"profile       none: log.profile_steps ends before step {first + 1}")
      with interrupt.Interrupt() as requests:
        status = self._all(state, missing, writers, requests)
    except UserError as error:
      self._look(writers)
      if writers.failure:  # what came first, and perhaps is why
        raise UserError(f"{writers.failure} {error}") from error
      raise
    finally:
      self.profile.stop(writers)
      writers.close()
    if writers.failure:
      newest = self.checkpointer.latest_step()
      raise UserError(f"{writers.failure} The run has ended; its newest checkpoint: step {newest}.")
    return status

  def _all(self, state, missing, writers, requests) -> int:
    first = int(state.step)
    if missing:
      writers.note(f"step {first}: doing what follows it and was not done.")
      if not self._follow(missing, state, first, writers, requests):
        return self._stop(first, writers, requests)
    if first < self.total:
      return self._steps(state, first, writers, requests)
    return self._done(writers)

  def _steps(self, state, first, writers, requests) -> int:
    batch = self._next_batch()
    step_fn = self._compile(state, batch, writers, requests)
    if step_fn is None:
      return requests.status
    pending = None  # the metrics of the step before, still on the device
    for done in range(first + 1, self.total + 1):
      if duties.is_due(self.config.log.debug_every, done - 1):
        self._debug(state, done - 1, writers)
      self.profile.before_step(done, writers)
      state, step_metrics = step_fn(state, batch, self.frozen)
      # From here to the next step the host works while the device does; it waits only for the
      # metrics of the step before.
      self._look(writers)
      if writers.failure:
        requests.ask()
      last, stops = done == self.total, requests.requested(done)
      self.checkpointer.check()
      due = duties.due(
        self.config,
        done,
        total=self.total,
        validation=self.plan.validation is not None,
        stops=stops,
      )
      if pending:
        self._report(*pending, writers)
      pending = (done, step_metrics)
      if due:
        self._report(*pending, writers)
        pending = None
      if due.save:
        # Before the next batch is taken: the iterator's state says which batches were trained on.
        self._save(state, done)
      if stops and not last:
        self.checkpointer.wait()
      if not self._follow(due, state, done, writers, requests) or (stops and not last):
        if not due.save:
          self._save(state, done)
        return self._stop(done, writers, requests)
      if due:
        self.throughput.restart()
      if not last:
        batch = self._next_batch()
    self.checkpointer.wait()
    return self._done(writers)

  def _done(self, writers) -> int:
    if not writers.failure:
      writers.note(f"done: step {self.total}, {self.workdir}")
    return 0

  def _stop(self, step, writers, requests) -> int:
    self.checkpointer.wait()
    if writers.failure:  # the run's error says the rest
      return 1
    writers.note(f"stopped by {requests.name} after step {step}; checkpoint saved.")
    return requests.status

  def _look(self, writers):
    with writers.keeping_failures(self.workdir):
      check_held(self.workdir, self.held)

  def _next_batch(self):
    rows = self.config.optim.micro_batch
    return sharding.put_batch(next(self.iterator), self.mesh, accumulated=True, rows=rows)

  def _compile(self, state, batch, writers, requests):
    """The step ahead of time, so that its memory is known before it runs, and compiled once.

    Returns:
      the step; None where a signal has come meanwhile, when there is nothing to save.
    """
    places = sharding.shardings(state, self.mesh)
    with metrics.Timer() as timer:
      step = train_step.jit_train_step(self.step_config, self.forward, places)
      compiled = step.lower(state, batch, self.frozen).compile()
    if requests.pending:
      writers.note(f"stopped by {requests.name} before the first step; nothing to save.")
      return None
    memory = compiled.memory_analysis()
    size = metrics.gibibytes(memory.temp_size_in_bytes) if memory else "unknown"
    writers.note(f"compiled      in {timer.seconds:.1f} s; temporary memory {size} a device")
    return compiled

  def _report(self, step, step_metrics, writers):
    values = metrics.train_metrics(jax.device_get(step_metrics), self.step_config.plan)
    self.throughput.add(values["tokens"])
    writers.advance()
    if duties.is_due(self.config.log.every, step) or step == self.total:
      writers.write(step, values | self.throughput.read())
    in_row = int(values["skipped_in_row"])
    if in_row >= self.config.optim.max_nonfinite:
      newest = self.checkpointer.latest_step()
      raise UserError(
        f"Step {step}: loss or gradient was not finite for {in_row} steps in a row;"
        f" nothing was updated in them. Last checkpoint: {newest if newest else 'none'}."
        " Lower config.optim.lr, or look at the data of these steps."
      )

  def _save(self, state, step):
    self.checkpointer.save(
      step,
      state,
      self.iterator,
      self.config.to_dict(),
      self.identity,
      run=self.record,
    )

  def _follow(self, due, state, step, writers, requests) -> bool:
    """What is due of the model after `step` steps, but for the checkpoint.

    Returns:
      whether all of it was done; a signal puts off what has not begun, and ends a validation.
    """
    if due.export:
      with writers.keeping_failures(self.workdir / f"global_step_{step}"):
        path = startup.save_hf(self.workdir, step, state.params, self.identity)
        writers.note(f"exported      {path}")
    if due.validate:
      self._evaluate(state, step, writers, requests)
    if due.answer and self.problems and not requests.pending:
      writers.write(step, self.problems.answer(state.params, self.frozen))
    return not (requests.pending and (due.validate or due.answer))

  def _evaluate(self, state, step, writers, requests):
    sums = None
    for host_batch in self.plan.eval_batches():
      if requests.pending:
        return
      rows = self.plan.validation.batch_size
      batch = sharding.put_batch(host_batch, self.mesh, accumulated=False, rows=rows)
      part = self.eval_step(state.params, batch, self.frozen)
      sums = part if sums is None else jax.tree.map(jax.numpy.add, sums, part)
    values = metrics.eval_metrics(jax.device_get(sums), self.config.objective, self.config.noise)
    writers.write(step, values)

  def _debug(self, state, step, writers):
    # The mesh splits rows over its shards, so each shard gets a copy of the one row.
    row, shards = self.plan.first_row(step), sharding.batch_shards(self.mesh)
    copies = len(sharding.local_rows(self.mesh, shards))
    tiled = row.map(lambda x: np.repeat(x, copies, axis=0))
    batch = sharding.put_batch(tiled, self.mesh, accumulated=False, rows=shards)
    rounds = jax.device_get(self.debug_rounds(state.params, batch, self.frozen, step=step))
    if processes.is_first():
      first = row.map(lambda x: x[0])
      text = debug_log.format_example(self.source.tokenizer, step, first, rounds)
      with writers.keeping_failures(self.workdir / "log" / "debug.log"):
        debug_log.append(self.workdir, text)
