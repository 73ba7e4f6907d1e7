"""One loop for every family: `fit` trains, `load` brings a run back, `sample` and `evaluate` use
it.

This package compiles, places arrays on devices, donates and saves. A run is a folder. The same
command continues it, and ends with the same bits as a run that nothing interrupted.

Read `loop.py` first. `config.py` has Run and Result, `checks.py` what is refused, `engine.py` the
compiled steps, `run_folder.py` what a run keeps, `inference.py` what a trained run is used for.
"""

from .checkpoints import SaveFailed
from .config import NonFinite, Result, Run
from .engine import ReadFailed
from .inference import evaluate, load, replay, sample
from .log import metrics
from .loop import fit
from .planning import plan
from .processes import connect
from .record import Refused
from .shipping import ship
from .weights import shipped

__all__ = [
    "NonFinite",
    "ReadFailed",
    "Refused",
    "Result",
    "Run",
    "SaveFailed",
    "connect",
    "evaluate",
    "fit",
    "load",
    "metrics",
    "plan",
    "replay",
    "sample",
    "ship",
    "shipped",
]
