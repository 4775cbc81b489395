"""Layers that keep a state return their result: ``self.mixer(x, output)`` becomes ``output = self.mixer(x)``.

The other engine's write into a tensor that is made for them, ``output = torch.empty_like(x)``, which goes.
"""

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.program import Program, self_attribute
from rtp_llm.port.rules.base import Rule, with_args
from rtp_llm.port.vocabulary import RECURRENT

OUTPUT = "output"
_MAKERS = m.Attribute(value=m.Name("torch"), attr=m.OneOf(*map(m.Name, ("empty", "empty_like", "zeros", "zeros_like"))))


class ReturnOutputs(Rule):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._written: list[set[str]] = []  # of the functions that are being visited: names that a layer writes into

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool | None:
        result = super().visit_FunctionDef(node)
        calls = (call for call in m.findall(node.body, m.Call()) if isinstance(call, cst.Call))
        outputs = (self._output(call) for call in calls)
        self._written.append({arg.value.value for arg in outputs if arg and isinstance(arg.value, cst.Name)})
        return result

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        self._written.pop()
        return super().leave_FunctionDef(original_node, updated_node)

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        noted = super().leave_SimpleStatementLine(original_node, updated_node)
        if not self._written or len(original_node.body) != 1:
            return noted
        if self._makes_output(original_node.body[0]):
            return cst.RemoveFromParent()
        call = original_node.body[0].value if isinstance(original_node.body[0], cst.Expr) else None
        output = self._output(call) if isinstance(call, cst.Call) else None
        if not isinstance(call, cst.Call) or output is None or not isinstance(output.value, cst.Name):
            return noted
        self.count("results returned, not written into a tensor")
        kept = [arg for arg in call.args if arg is not output]
        assign = cst.Assign([cst.AssignTarget(output.value)], with_args(call, kept))
        return updated_node.with_changes(body=[assign])

    def _makes_output(self, node: cst.BaseSmallStatement) -> bool:
        if not isinstance(node, cst.Assign) or not m.matches(node, m.Assign(value=m.Call(func=_MAKERS))):
            return False
        targets = [target.target for target in node.targets]
        return all(isinstance(target, cst.Name) and target.value in self._written[-1] for target in targets)

    def _output(self, call: cst.Call) -> cst.Arg | None:
        """Return the argument of a recurrent layer's call that it writes into."""
        values = self.scope.attributes.assigned.get(self_attribute(call.func), [])
        layers = [value for value, _ in values if isinstance(value, cst.Call)]
        if not layers or not all(self.program.is_engine(layer.func, *RECURRENT) for layer in layers):
            return None
        named = next((arg for arg in call.args if arg.keyword and arg.keyword.value == OUTPUT), None)
        plain = [arg for arg in call.args if not arg.keyword and not arg.star]
        return named or (plain[1] if len(plain) == 2 else None)


def return_outputs(program: Program) -> None:
    ReturnOutputs.apply(program)
