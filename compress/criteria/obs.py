"""The row `OBS` of the EigenDamage table: Kron-OBS with the empirical Fisher (the data's labels, not labels drawn from the network)."""

from typing import Literal

from pydantic import Field

from compress.criteria import CRITERIA
from compress.criteria.kron_obs import KronObs
from compress.criteria.second_order import ObsOptions


class EmpiricalOptions(ObsOptions):
    """Options of `obs`."""

    fisher: Literal["true", "exact", "empirical"] = Field(
        "empirical", description="labels drawn from the network, all classes weighted, or the data's labels"
    )


@CRITERIA.register("obs")
class Obs(KronObs):
    """Kron-OBS on the data's labels."""

    name = "obs"
    Options = EmpiricalOptions
