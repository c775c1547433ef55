"""Training and what belongs to it: `fit`, `evaluate`, `recalibrate`, and `connect` for several processes."""

from compress.train.distributed import Dist, connect
from compress.train.evaluate import evaluate
from compress.train.loop import History, fit
from compress.train.recalibrate import recalibrate

__all__ = ["Dist", "History", "connect", "evaluate", "fit", "recalibrate"]
