"""Generative models as pure functions in JAX: one file a family."""

from . import gan, vae

__all__ = ["gan", "vae"]
__version__ = "0.1.0"
