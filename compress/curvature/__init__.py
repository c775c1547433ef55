"""Curvature of the loss: Kronecker factors of every layer, their eigenbases, the EKFAC correction, and the formulas that use them."""

from compress.curvature.collect import collect
from compress.curvature.layer_factors import LayerFactors
from compress.curvature.linalg import eigh
from compress.curvature.per_sample import ekfac, squared_gradients
from compress.curvature.processes import local
from compress.curvature.quadratic import predicted_loss

__all__ = ["LayerFactors", "collect", "eigh", "ekfac", "local", "predicted_loss", "squared_gradients"]
