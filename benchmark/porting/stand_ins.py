"""All stand-ins, by architecture. See ``stand_in.py`` for what they are."""

from dense_stand_ins import DENSE
from expert_stand_ins import WITH_EXPERTS
from stand_in import StandIn

STAND_INS: dict[str, StandIn] = {**DENSE, **WITH_EXPERTS}
