"""SGLang's stage boundaries become the residual sums that they stand for.

``x = self.attn_boundary.prepare(x, forward_batch)`` norms the residual stream, and
``x = self.attn_boundary.finish(x, forward_batch)`` adds what the stage made of it. The engine there may put the sum off
into the next norm, or join it with the sum over ranks: here each is written where it is due, and every layer sums over
the ranks itself (``reduce_results`` keeps its default).
"""

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.program import Program, code, self_attribute
from rtp_llm.port.rules.base import Rule, expression, with_args
from rtp_llm.port.rules.fold import tidied

_PLAIN = frozenset({
    "sparse", "next_layer_sparse", "read", "parallel_group", "is_nextn", "previous_layer_sparse", "allreduce_fusion",
})  # fmt: skip
_DECLARATIONS = frozenset({"stage_facts", "_attn_readout"})
REDUCE = "tensor_model_parallel_all_reduce"


class Boundaries(Rule):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.norms: dict[tuple[str, str], str] = {}  # class, attribute of its boundary -> its norm
        for name, node in program.classes().items():
            for assign in m.findall(node, m.Assign(targets=[m.AssignTarget(m.Tuple())], value=m.Call())):
                self._read(name, cst.ensure_type(assign, cst.Assign))
        self.changes = sorted(
            arg.keyword.value
            for call in m.findall(program.module, m.Call(func=m.Name()))
            for arg in (call.args if isinstance(call, cst.Call) and _declares(call, program) else ())
            if arg.keyword and arg.keyword.value not in _PLAIN
        )

    def _read(self, owner: str, assign: cst.Assign) -> None:
        call = cst.ensure_type(assign.value, cst.Call)
        names = [self_attribute(part.value) for part in cst.ensure_type(assign.targets[0].target, cst.Tuple).elements]
        if not self.program.is_engine(call.func, "append_stages") or len(names) != len(call.args):
            return
        for name, arg in zip(names, call.args, strict=True):
            if isinstance(arg.value, cst.Tuple) and len(arg.value.elements) >= 2:
                self.norms[owner, name] = code(arg.value.elements[1].value)

    def _boundary(self, func: cst.BaseExpression, method: str) -> str | None:
        """Return the norm of the boundary that a method is called of; None if it is no such call."""
        if not isinstance(func, cst.Attribute) or func.attr.value != method or not self.class_stack:
            return None
        name = self_attribute(func.value)
        owners = [owner for owner, attribute in self.norms if attribute == name]
        owner = self.class_stack[-1] if self.class_stack[-1] in owners else next(iter(owners), "")
        return self.norms.get((owner, name))

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        small = updated_node.body[0]
        value = small.value if isinstance(small, cst.Assign | cst.Expr) else None
        if isinstance(value, cst.Call):
            if self._is_engines(value, "append_stages") or self._is_batch(value, "start", "clear"):
                super().leave_SimpleStatementLine(original_node, updated_node)
                return cst.RemoveFromParent()
            norm = self._boundary(value.func, "prepare")
            if norm is not None and isinstance(small, cst.Assign):
                self.count("residual sums written out")
                if self.changes or norm == "None":
                    self.review(
                        f"stages here are declared with {', '.join(self.changes) or 'no norm'}: what is added to the "
                        "residual may be changed before, which must be written out"
                    )
                noted = super().leave_SimpleStatementLine(original_node, updated_node)
                return self._prepared(cst.ensure_type(noted, cst.SimpleStatementLine), small, value, norm)
        return super().leave_SimpleStatementLine(original_node, updated_node)

    def _prepared(
        self, line: cst.SimpleStatementLine, assign: cst.Assign, call: cst.Call, norm: str
    ) -> cst.FlattenSentinel[cst.SimpleStatementLine]:
        target, given = code(assign.targets[0].target), code(call.args[0].value)
        keep = cst.ensure_type(cst.parse_statement(f"residual = {given}"), cst.SimpleStatementLine)
        keep = keep.with_changes(leading_lines=line.leading_lines)
        if norm == "None":
            normed = cst.ensure_type(cst.parse_statement(f"{target} = {given}"), cst.SimpleStatementLine)
            return cst.FlattenSentinel([keep] if target == given else [keep, normed])
        normed = cst.ensure_type(cst.parse_statement(f"{target} = {norm}({given})"), cst.SimpleStatementLine)
        return cst.FlattenSentinel([keep, normed])

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if self._boundary(updated_node.func, "finish") is not None and updated_node.args:
            return expression(f"residual + {code(updated_node.args[0].value)}")
        if self._is_batch(updated_node, "final_norm") and len(updated_node.args) >= 3:
            return expression(f"{code(updated_node.args[2].value)}({code(updated_node.args[0].value)})")
        if self._is_batch(updated_node, "complete_output", "take_output", "fold", "snapshot") and updated_node.args:
            return updated_node.args[0].value
        return self._summed(updated_node)

    def _summed(self, call: cst.Call) -> cst.Call:
        """A layer that a boundary would have summed over the ranks does it itself."""
        if not self.norms or self._has_own_sum:
            return call
        names = [arg.keyword.value if arg.keyword else "" for arg in call.args]
        if "reduce_results" not in names:
            return call
        return with_args(call, [arg for arg, name in zip(call.args, names, strict=True) if name != "reduce_results"])

    @property
    def _has_own_sum(self) -> bool:
        node = self.program.classes().get(self.class_stack[-1]) if self.class_stack else None
        return node is not None and bool(m.findall(node, m.Call(func=m.Name(REDUCE))))

    def _is_batch(self, call: cst.Call, *names: str) -> bool:
        """Whether a call is one of the module of residual streams."""
        if not isinstance(call.func, cst.Attribute) or call.func.attr.value not in names:
            return False
        return self.program.engine_name(call.func.value) == "batch"

    def _is_engines(self, call: cst.Call, name: str) -> bool:
        return self.program.is_engine(call.func, name)

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        noted = super().leave_FunctionDef(original_node, updated_node)
        is_method = bool(self.class_stack) and not self.function_stack
        return cst.RemoveFromParent() if is_method and original_node.name.value in _DECLARATIONS else noted

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)


def _declares(call: cst.Call, program: Program) -> bool:
    return program.is_engine(call.func, "declare_attn", "declare_ffn")


def write_residuals(program: Program) -> None:
    Boundaries.apply(program)
