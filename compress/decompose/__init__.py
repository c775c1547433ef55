"""Low-rank decompositions of weights, with and without curvature, and the modules that carry them.

Functions on tensors return `Factors`; `factorize` turns a Linear or Conv2d into a block of smaller layers.
"""

from compress.decompose.eigen import eigendamage
from compress.decompose.factors import Factors, merge_core, orthonormalise, recompose
from compress.decompose.kfac import kfac_svd, kfac_tucker2
from compress.decompose.kfac_cp import kfac_cp
from compress.decompose.layer import factorize
from compress.decompose.modules import FactorizedConv2d, FactorizedLinear
from compress.decompose.unweighted import cp, svd, tucker2

__all__ = ["Factors", "FactorizedConv2d", "FactorizedLinear", "cp", "eigendamage", "factorize", "kfac_cp", "kfac_svd", "kfac_tucker2", "merge_core",
           "orthonormalise", "recompose", "svd", "tucker2"]
