"""C-OBS (Wang et al. 2019): s_i = 1/2 sum_j w_ij^2 / ([G^-1]_ii [A^-1]_jj), element-wise OBS saliencies under K-FAC added over the channel.

The remaining weights are updated by the joint formula of `second_order.compensate`: the element-wise corrections of the paper, added up,
do not minimise the loss.
"""

from compress.criteria import CRITERIA
from compress.criteria.kron_obs import KronObs
from compress.curvature import obs


@CRITERIA.register("c_obs")
class CObs(KronObs):
    """Sum of the OBS saliencies of a channel's weights, labels drawn from the network."""

    name = "c_obs"
    rows = staticmethod(obs.row_elements_obs)
    columns = staticmethod(obs.column_elements_obs)
