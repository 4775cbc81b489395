"""Attention of encoders: segments are told by their bounds alone.

``MMEncoderAttention`` has the same name and call here. What the other engine computes of the bounds for its kernels,
such as their longest segment, is not needed.
"""

import libcst as cst

from rtp_llm.port.program import Program, code
from rtp_llm.port.rules.base import Rule, expression
from rtp_llm.port.source import Origin

ATTENTION = "MMEncoderAttention"
_BOUNDS = ("attn_backend", "cu_seqlens", "hidden_size", "tp_size", "device")  # parameters of what prepares them


class RewriteEncoders(Rule):
    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        func = original_node.func
        if not isinstance(func, cst.Attribute) or not self.program.is_engine(func.value, ATTENTION):
            return updated_node
        self.count("bounds of segments handed on as they are")
        match func.attr.value:
            case "maybe_compute_seq_lens":
                return expression("None")
            case "compute_max_seqlen":
                return expression("0")
            case "maybe_recompute_cu_seqlens":
                return self._bounds(updated_node)
        self.review(f"{ATTENTION}.{func.attr.value} has no equivalent here: its layers only need cu_seqlens")
        return updated_node

    def _bounds(self, call: cst.Call) -> cst.BaseExpression:
        given = {arg.keyword.value if arg.keyword else _BOUNDS[i]: code(arg.value) for i, arg in enumerate(call.args)}
        self.program.imports.setdefault("torch", Origin("torch"))
        return expression(f"torch.as_tensor({given['cu_seqlens']}, device={given.get('device')})")


def rewrite_encoders(program: Program) -> None:
    RewriteEncoders.apply(program)
