"""What differs in SGLang's files, whose conventions are this engine's.

Stages and captured states go as in vLLM's files. ``config.rope_theta``, ``rope_scaling`` and
``partial_rotary_factor``, which configurations of transformers 5 do not have any more, are read by ``get_rope_config``.
``GeluAndMul()`` means what it means here.
"""

import libcst as cst

from rtp_llm.port.program import Program, code
from rtp_llm.port.rules.base import Rule, expression
from rtp_llm.port.rules.logits import ProvideEmbeddings
from rtp_llm.port.source import Origin
from rtp_llm.port.vocabulary import LAYERS

# Fields of a configuration -> their place in what get_rope_config returns.
_ROPE_FIELDS = {"rope_theta": 0, "rope_scaling": 1, "partial_rotary_factor": 2}


class ReadRope(Rule):
    """``getattr(config, "rope_theta", 10000)`` and ``config.rope_theta`` become ``get_rope_config(config)[0]``."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        args = updated_node.args
        if code(updated_node.func) != "getattr" or len(args) < 2 or not isinstance(args[1].value, cst.SimpleString):
            return updated_node
        return self._read(args[0].value, str(args[1].value.evaluated_value)) or updated_node

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        return self._read(updated_node.value, updated_node.attr.value) or updated_node

    def visit_AssignTarget(self, node: cst.AssignTarget) -> bool:
        return False

    def _read(self, holder: cst.BaseExpression, name: str) -> cst.BaseExpression | None:
        if name not in _ROPE_FIELDS or not code(holder).endswith("config"):
            return None
        self.count("rotary settings read by get_rope_config")
        self.program.imports.setdefault("get_rope_config", Origin(f"{LAYERS}.rotary", "get_rope_config"))
        return expression(f"get_rope_config({code(holder)})[{_ROPE_FIELDS[name]}]")


def rewrite_sglang(program: Program) -> None:
    ReadRope.apply(program)
    ProvideEmbeddings.apply(program)
