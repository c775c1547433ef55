"""The row `OBD` of the EigenDamage table: Kron-OBD with the empirical Fisher (the data's labels, not labels drawn from the network)."""

from typing import Literal

from pydantic import Field

from compress.criteria import CRITERIA
from compress.criteria.kron_obd import KronObd
from compress.criteria.second_order import SecondOrderOptions


class EmpiricalOptions(SecondOrderOptions):
    """Options of `obd`."""

    fisher: Literal["true", "exact", "empirical"] = Field(
        "empirical", description="labels drawn from the network, all classes weighted, or the data's labels"
    )


@CRITERIA.register("obd")
class Obd(KronObd):
    """Kron-OBD on the data's labels."""

    name = "obd"
    Options = EmpiricalOptions
