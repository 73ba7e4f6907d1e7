"""The commands of `python -m aigc_jax`: sample, evaluate, export, info, replay, plan, compare."""
