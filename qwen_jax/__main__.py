"""`python -m qwen_jax` is the `qwen-jax` command."""

from qwen_jax.cli import main

main()
