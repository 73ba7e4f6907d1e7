"""Generative models as pure functions in JAX.

`aigc_jax.vae`, `aigc_jax.train` and the other modules are imported at first use (PEP 562).
"""

# Only importlib is imported here, which Python itself has loaded. The command line removes the
# current directory from the path before it imports more: that may be a run folder, whose files
# could be imported in place of real modules.
import importlib

TYPE_CHECKING = False  # type checkers treat it like typing.TYPE_CHECKING
if TYPE_CHECKING:
    from . import (
        contrastive,
        core,
        data,
        ddpm,
        figures,
        gan,
        language,
        metrics,
        nn,
        train,
        transformer,
        vae,
    )

__all__ = [
    "contrastive",
    "core",
    "data",
    "ddpm",
    "figures",
    "gan",
    "language",
    "metrics",
    "nn",
    "train",
    "transformer",
    "vae",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
