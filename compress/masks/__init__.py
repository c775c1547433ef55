"""Unstructured and patterned masks on weights: attach, prune, train under, make permanent, save.

masks = Masks.attach(model, "conv+linear")
prune(masks, "magnitude", 0.1)
... optimizer.step(); masks.after_step(optimizer) ...
masks.make_permanent()
"""

from compress.masks.buffers import Masks, add_buffers, enforced, mask_names
from compress.masks.patterns import Block, NofM, Pattern, Unstructured, VectorBlock, parse_pattern
from compress.masks.prune import prune
from compress.masks.scope import SCOPES, select_parameters
from compress.masks.select import keep_count, select
from compress.masks.storage import load_masked, save_masked

__all__ = [
    "SCOPES", "Block", "Masks", "NofM", "Pattern", "Unstructured", "VectorBlock", "add_buffers", "enforced", "keep_count", "load_masked",
    "mask_names", "parse_pattern", "prune", "save_masked", "select", "select_parameters",
]  # fmt: skip
