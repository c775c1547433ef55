"""Kron-OBS (Wang et al. 2019): s_i = 1/2 (w_i A w_i^T) / [G^-1]_ii, the K-FAC loss of removing row i after the others are compensated.

Several channels are compensated jointly (`second_order.compensate`): in the layers that read them, or in those that make them.
"""

from compress.criteria import CRITERIA
from compress.criteria.second_order import ObsOptions, SecondOrder
from compress.curvature import obs


@CRITERIA.register("kron_obs")
class KronObs(SecondOrder):
    """K-FAC loss of a channel after compensation, labels drawn from the network."""

    name = "kron_obs"
    Options = ObsOptions
    compensates = True
    rows = staticmethod(obs.rows_obs)
    columns = staticmethod(obs.columns_obs)
