"""Generative models as pure functions in JAX: one file a family."""

from . import gan, transformer, vae

__all__ = ["gan", "transformer", "vae"]
__version__ = "0.1.0"
