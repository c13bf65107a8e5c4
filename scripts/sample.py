"""Answers prompts in the terminal, committed text as it comes; `refine-jax sample` is the same.

    python scripts/sample.py --model=DIR --prompt="What is 2+2?" [--mode=exact] [--block_size=8]
    python scripts/sample.py --model=DIR --prompts_file=prompts.txt --jsonl > answers.jsonl
    python scripts/sample.py --model=DIR --chat
    python scripts/sample.py --model=DIR --prompt="What is 2+2?" --html=passes.html

--help lists all options; refine_jax/terminal/ is what does it.
"""

from refine_jax.terminal.command import main

if __name__ == "__main__":
  main()
