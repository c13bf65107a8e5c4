"""The training run: builds everything, then loops. The only place that knows all the parts."""

import functools
from pathlib import Path

import jax
import numpy as np

from refine_jax import interrupt, sharding
from refine_jax.checkpoint.checkpointer import Checkpointer
from refine_jax.config import Config
from refine_jax.errors import UserError
from refine_jax.objective import noise
from refine_jax.objective import plan as plan_lib
from refine_jax.training import debug_log, metrics, startup, train_step
from refine_jax.training.data_plan import plan_data
from refine_jax.training.flops import peak_flops, train_flops_per_token
from refine_jax.training.problems import Problems
from refine_jax.training.source import read_source


def run(config: Config, workdir: str) -> int:
  """Trains to the end, from wherever the run stands (startup.start says from where).

  Returns:
    the process's exit status: 0, or 128 + the signal that ended the run after a checkpoint.

  Raises:
    UserError: what a user can mend.
  """
  workdir = Path(workdir).absolute()
  noise.from_config(config.noise)  # refuses, before anything is done, what the kind cannot do
  startup.check_workdir(workdir, config)
  startup.enable_compilation_cache()
  mesh = sharding.make_mesh(config.mesh)
  source = read_source(config)
  sharding.check_fit(
    mesh, config.optim, source.model.heads, source.model.kv_heads, config.data.max_length
  )
  plan = plan_data(config, source, mesh)
  compute = startup.choose_compute(config, source.model, mesh, plan)
  recipe = startup.make_recipe(config, source, plan)
  iterator = plan.train_iterator()
  checkpointer = Checkpointer(workdir, max_to_keep=config.checkpoint.max_ckpt_to_keep)
  try:
    state, origin = startup.start(config, source, recipe, mesh, checkpointer, iterator)
    # After the start: a workdir of another model has been refused by now, and is left as it was.
    startup.prepare_workdir(workdir, config, source, recipe.noise_token)
    for line in startup.describe(config, source, plan, recipe, compute, state, origin):
      print(line)
    loop = _Loop(config, workdir, source, plan, recipe, compute, checkpointer, iterator)
    return loop.run(state)
  finally:
    checkpointer.close()


class _Loop:
  """One method for each thing that happens at a step."""

  def __init__(self, config, workdir, source, plan, recipe, compute, checkpointer, iterator):
    self.config, self.workdir, self.source, self.plan = config, workdir, source, plan
    self.recipe, self.compute, self.mesh = recipe, compute, compute.mesh
    self.checkpointer, self.iterator = checkpointer, iterator
    self.total = recipe.total_steps
    bound = {"step_config": recipe, "forward": compute}
    self.eval_step = jax.jit(functools.partial(train_step.eval_step, **bound))
    self.debug_rounds = jax.jit(functools.partial(train_step.debug_rounds, **bound))
    columns = noise.from_config(config.noise).columns_per_token
    passes = plan_lib.passes(recipe.plan) * columns
    flops = train_flops_per_token(source.model, plan.train.mean_length, passes)
    self.problems = None
    if config.eval.generate_every:
      self.problems = Problems(config, source.model, workdir / "model", compute.dtype)
    self.throughput = metrics.Throughput(flops, peak_flops(), self.mesh.size)

  def run(self, state) -> int:
    first = int(state.step)
    writers = metrics.Writers(
      self.workdir, self.config.log, self.config.to_dict(), first=first, total=self.total
    )
    try:
      if first >= self.total:
        writers.note(f"step {first}: this run is complete; nothing left to do.")
        return 0
      with interrupt.Interrupt() as requests:
        return self._steps(state, first, writers, requests)
    finally:
      writers.close()

  def _steps(self, state, first, writers, requests) -> int:
    host_batch, batch = self._next_batch()
    step_fn = self._compile(state, batch, writers)
    pending = None  # the metrics of the step before, still on the device
    for done in range(first + 1, self.total + 1):
      if self._due(self.config.log.debug_every, done - 1):
        self._debug(state, host_batch, done - 1)
      self._profile(done)
      state, step_metrics = step_fn(state, batch)
      # From here to the next step the host works while the device does; it waits only for the
      # metrics of the step before.
      last, stops = done == self.total, requests.requested(done)
      self.checkpointer.check()
      saves = last or stops or self._due(self.config.checkpoint.save_every, done)
      evaluates = last or self._due(self.config.eval.eval_every, done)
      generate_every = self.config.eval.generate_every
      answers = generate_every > 0 and (last or self._due(generate_every, done))
      if pending:
        self._report(*pending, writers)
      pending = (done, step_metrics)
      if saves or evaluates or answers:
        self._report(*pending, writers)
        pending = None
      if saves:
        # Before the next batch is taken: the iterator's state says which batches were trained on.
        self._save(state, done, writers)
      if stops and not last:
        self.checkpointer.wait()
        writers.note(f"stopped by {requests.name} after step {done}; checkpoint saved.")
        return requests.status
      if evaluates:
        self._evaluate(state, done, writers)
      if answers:
        writers.write(done, self.problems.answer(state.params))
      if saves or evaluates or answers:
        self.throughput.restart()
      if not last:
        host_batch, batch = self._next_batch()
    self.checkpointer.wait()
    writers.note(f"done: step {self.total}, {self.workdir}")
    return 0

  def _next_batch(self):
    host_batch = next(self.iterator)
    return host_batch, sharding.put_batch(host_batch, self.mesh, accumulated=True)

  def _compile(self, state, batch, writers):
    """The step ahead of time, so that its memory is known before it runs, and compiled once."""
    places = sharding.shardings(state, self.mesh)
    with metrics.Timer() as timer:
      lowered = train_step.jit_train_step(self.recipe, self.compute, places).lower(state, batch)
      compiled = lowered.compile()
    memory = compiled.memory_analysis()
    size = metrics.gibibytes(memory.temp_size_in_bytes) if memory else "unknown"
    writers.note(f"compiled      in {timer.seconds:.1f} s; temporary memory {size} a device")
    return compiled

  def _due(self, every: int, step: int) -> bool:
    return every > 0 and step % every == 0

  def _profile(self, done):
    first, last = self.config.log.profile_steps
    if last and done == first:
      jax.profiler.start_trace(str(self.workdir / "profile"))
    if last and done == last + 1:
      jax.profiler.stop_trace()

  def _report(self, step, step_metrics, writers):
    values = metrics.train_metrics(jax.device_get(step_metrics), self.recipe.plan)
    self.throughput.add(values["tokens"])
    writers.advance()
    if self._due(self.config.log.every, step) or step == self.total:
      writers.write(step, values | self.throughput.read())
    in_row = int(values["skipped_in_row"])
    if in_row >= self.config.optim.max_nonfinite:
      newest = self.checkpointer.latest_step()
      raise UserError(
        f"Step {step}: loss or gradient was not finite for {in_row} steps in a row;"
        f" nothing was updated in them. Last checkpoint: {newest if newest else 'none'}."
        " Lower config.optim.lr, or look at the data of these steps."
      )

  def _save(self, state, step, writers):
    self.checkpointer.save(
      step, state, self.iterator, self.config.to_dict(), startup.identity(self.source.model)
    )
    if self.config.checkpoint.save_hf:
      path = startup.save_hf(self.workdir, step, state.params)
      writers.note(f"exported      {path}")

  def _evaluate(self, state, step, writers):
    if self.plan.validation is None:
      return
    sums = None
    for host_batch in self.plan.eval_batches():
      batch = sharding.put_batch(host_batch, self.mesh, accumulated=False)
      part = self.eval_step(state.params, batch)
      sums = part if sums is None else jax.tree.map(jax.numpy.add, sums, part)
    values = metrics.eval_metrics(jax.device_get(sums), self.config.objective, self.config.noise)
    writers.write(step, values)

  def _debug(self, state, host_batch, step):
    # One row, as many times as there are shards of rows, so that it fits the mesh.
    row = host_batch.map(lambda x: x[0, :1])
    copies = sharding.batch_shards(self.mesh) // jax.process_count()
    tiled = row.map(lambda x: np.repeat(x, copies, axis=0))
    batch = sharding.put_batch(tiled, self.mesh, accumulated=False)
    rounds = jax.device_get(self.debug_rounds(state.params, batch, step=step))
    if jax.process_index() == 0:
      first = row.map(lambda x: x[0])
      debug_log.append(
        self.workdir, debug_log.format_example(self.source.tokenizer, step, first, rounds)
      )
