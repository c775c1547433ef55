"""Networks for small images, one file per family, with exact parameter and MAC counts in the docstrings.

`build(name, num_classes, in_channels=3, **options)` makes a network with fresh initial weights, `names()` lists the networks defined here
(`torchvision/<name>` is accepted besides), `info(name, **options)` tells what a configuration check needs, and `load_weights(model, path)`
fills a network from a safetensors file.
"""

from .registry import ModelInfo, build, info, names
from .weights import find_weights, load_weights

__all__ = ["ModelInfo", "build", "find_weights", "info", "load_weights", "names"]
