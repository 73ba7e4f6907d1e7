"""Generative models as pure functions in JAX: one file a family."""

from . import ddpm, gan, transformer, vae

__all__ = ["ddpm", "gan", "transformer", "vae"]
__version__ = "0.1.0"
