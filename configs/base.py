"""Every key of a run, with its default. Experiments import this file and override.

    python -m refine_jax.main --config=configs/base.py --workdir=runs/mine \
        --config.model.pretrained=DIR_OR_HUB_NAME --config.data.train_files=train.parquet

`refine_jax/config.py` turns the result into frozen dataclasses and checks it; a key that is
not in this file is an error there, and each key here is read somewhere.
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(recipe: str = "document") -> ConfigDict:
  c = ConfigDict()
  # Everything random is a function of (seed, step, example).
  c.seed = 0

  c.data = data = ConfigDict()
  # Parquet with a prompt and a response a row: a path, a glob, or several separated by commas.
  data.train_files = ""
  # The same for validation; empty: none.
  data.val_files = ""
  # Columns. Each holds a string or a list of chat messages {role, content}.
  data.prompt_key = "prompt"
  data.response_key = "target"
  # Tokens a row, prompt and response and EOS together.
  data.max_length = 2048
  # A longer example: "error" stops, "left" drops its first tokens, "right" its last.
  data.truncation = "right"
  # Fill each row with several examples (attention never crosses); False: one a row.
  data.pack = True
  # At most this many examples in a row; the attention kernel's metadata grows with it.
  data.max_segments = 64
  # A Jinja chat template for tokenizers that have none; empty: stop if there is none.
  data.chat_template = ""
  # Where tokenised data is kept; empty: ~/.cache/refine_jax. REFINE_JAX_CACHE overrides.
  data.cache_dir = ""
  # Batches made ready ahead of the step.
  data.prefetch = 4

  c.model = model = ConfigDict()
  # A Hugging Face directory or hub name with the weights to start from; empty: from scratch.
  model.pretrained = ""
  # From scratch: a directory with config.json (weights, if any, are not read).
  model.config = ""
  # A directory or hub name; empty: the same as `pretrained`, or `config`.
  model.tokenizer = ""
  # Let transformers run Python code that comes with a hub tokenizer.
  model.trust_remote_code = False
  # Matrix products and activations; master weights stay in float32.
  model.compute_dtype = "bfloat16"
  # auto | xla | cudnn | cudnn_packed | splash: see refine_jax/attention.py.
  model.attention = "auto"
  # What a layer keeps for its backward pass: auto | none | save_attention_mlp |
  # save_attention | full (model/remat.py).
  model.remat = "auto"
  # Layers in each turn of the scan over layers, all of them: no scan. 0: no scan on an accelerator,
  # where that saves copies, but for remat "full", which needs the scan to save memory.
  model.scan_unroll = 0
  # Tokens the output head works on at a time.
  model.head_chunk = 2048
  # Gradients of the head: auto | forward (three matmuls) | recompute (four, less memory).
  model.head_gradient = "auto"

  c.objective = objective = ConfigDict()
  # Rounds: 1 denoises the noised response, each further one refines the last prediction.
  objective.num_iterations = 2
  # The weight of each round's loss.
  objective.loss_weights = (1.0, 1.0)

  # Beside the rounds, the next-token loss on the clean text; 0: none. It keeps what the model can
  # do one token at a time. A pass of its own with noise.kind "uniform", free with "block".
  objective.clean_weight = 0.0

  c.noise = noise = ConfigDict()
  # uniform: each response token with its example's rate; block: beside the clean text, the whole
  # response in blocks as a block sampler sees them (objective/noise/block.py).
  noise.kind = "uniform"
  # Tokens that a pass of the sampler may commit: the blocks of kind "block", of validation, and of
  # eval.generate_every.
  noise.block_size = 8
  # How much a draft counts less than the one before it in a block: later ones are harder to guess.
  noise.offset_decay = 1.0
  # The rate of an example is uniform in [noise_min, noise_max].
  noise.noise_min = 0.1
  noise.noise_max = 0.9
  # The id that replaces a noised token; -1: EOS.
  noise.token = -1

  c.optim = optim = ConfigDict()
  # Rows (of max_length tokens) in one optimizer step, over all devices.
  optim.batch_size = 64
  # Micro-batches that a step is split into; the result does not depend on it.
  optim.accumulation = 1
  optim.total_epochs = 3
  # Optimizer steps; -1: as many as total_epochs give.
  optim.total_steps = -1
  # Linear warm-up over this share of the steps, then a cosine to zero.
  optim.lr = 1e-5
  optim.warmup_ratio = 0.05
  optim.betas = (0.9, 0.95)
  optim.eps = 1e-8
  # Not applied to norms and biases.
  optim.weight_decay = 0.01
  # Global norm; 0: off.
  optim.clip_grad = 1.0
  # Of Adam's first moment: float32 or bfloat16.
  optim.moment_dtype = "float32"
  # Steps in a row without a finite loss and gradient before the run stops.
  optim.max_nonfinite = 5

  c.mesh = mesh = ConfigDict()
  # Devices along each axis; -1 on one of them: all that are left.
  mesh.data = -1
  mesh.fsdp = 1
  mesh.tensor = 1

  c.checkpoint = checkpoint = ConfigDict()
  # Optimizer steps between checkpoints; the last step is always kept.
  checkpoint.save_every = 1000
  checkpoint.max_ckpt_to_keep = 3
  # auto: go on from the workdir's newest; disable: refuse a used workdir; resume_path.
  checkpoint.resume_mode = "auto"
  # For resume_path: a workdir (its newest checkpoint) or WORKDIR/checkpoints/STEP.
  checkpoint.resume_from_path = ""
  # Also write each as Hugging Face files to WORKDIR/global_step_N/huggingface. These are releases:
  # max_ckpt_to_keep does not delete them.
  checkpoint.save_hf = False

  c.eval = evaluation = ConfigDict()
  # Optimizer steps between validations, also at the end; 0: only at the end.
  evaluation.eval_every = 200
  # Rows in one validation batch; 0: those of a training micro-batch.
  evaluation.batch_size = 0
  # Optimizer steps between answering problems (columns data.prompt_key and "answer"), also at the
  # end, in blocks of noise.block_size, mode exact; 0: never. One host only.
  evaluation.generate_every = 0
  evaluation.generate_file = ""
  # The first so many of them, and new tokens at most.
  evaluation.generate_rows = 64
  evaluation.generate_tokens = 256

  c.log = log = ConfigDict()
  # Steps between lines of metrics.
  log.every = 1
  # Steps between examples shown as text in WORKDIR/log/debug.log; 0: none.
  log.debug_every = 100
  # console, tensorboard, wandb; metrics.jsonl is always written.
  log.logger = ("console", "tensorboard")
  # For wandb.
  log.project_name = "refine_jax"
  log.experiment_name = ""
  # Steps to profile, into WORKDIR/profile: (first, last); (0, 0): none.
  log.profile_steps = (0, 0)
  return recipes.apply(c, recipe).lock()
