"""Kron-OBD (Wang et al. 2019): s_i = 1/2 G_ii w_i A w_i^T, the K-FAC loss of removing row i, no compensation.

w_i is row i with its bias; the true quadratic form is used (the released code sums squares against row sums of A, which can be negative).
"""

from compress.criteria import CRITERIA
from compress.criteria.second_order import SecondOrder
from compress.curvature import obs


@CRITERIA.register("kron_obd")
class KronObd(SecondOrder):
    """K-FAC loss of a channel, labels drawn from the network."""

    name = "kron_obd"
    rows = staticmethod(obs.rows_obd)
    columns = staticmethod(obs.columns_obd)
