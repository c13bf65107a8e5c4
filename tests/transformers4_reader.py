"""Reads exports with whatever transformers is installed: python transformers4_reader.py DIR...

Prints a JSON object: the version, and of each directory ids of a text and of a chat, and the answer
to it by generate and by custom_generate. Nothing of refine_jax is in here.
"""

import json
import sys

import torch
import transformers

CHAT = [{"role": "user", "content": "w5 w9 say it"}]
NEW = 16


def read(directory: str) -> dict:
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
  inputs = tokenizer([chat], return_tensors="pt", add_special_tokens=False)
  inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
  model = transformers.AutoModelForCausalLM.from_pretrained(directory)
  options = {"max_new_tokens": NEW, "do_sample": False}
  with torch.no_grad():
    answer = model.generate(**inputs, **options)
    parallel = model.generate(
      **inputs, **options, custom_generate=directory, trust_remote_code=True
    )
  return {
    "text": tokenizer("w5 w9 say it")["input_ids"],
    "special": [tokenizer.eos_token_id, tokenizer.pad_token_id],
    "chat": inputs["input_ids"].tolist(),
    "answer": answer.tolist(),
    "parallel": parallel.tolist(),
  }


if __name__ == "__main__":
  torch.set_num_threads(1)  # what tiny models want
  found = {directory: read(directory) for directory in sys.argv[1:]}
  print(json.dumps({"version": transformers.__version__, "models": found}))
