"""What nothing calls any more, since the branches that called it cannot be taken, goes: methods, classes, functions."""

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.names import names_in
from rtp_llm.port.program import Program
from rtp_llm.port.rules.base import Rule
from rtp_llm.port.rules.fold import tidied
from rtp_llm.port.source import Statement, bound_names

# Methods that this engine, torch or another rule calls.
CALLED = frozenset({
    "forward", "load_weights", "compute_logits", "embed_input_ids", "get_input_embeddings", "extra_repr",
    "get_image_feature", "get_video_feature", "get_mrope_input_positions", "pad_input_ids", "weight_loader",
    "finish_load", "cache_spec",
})  # fmt: skip


class RemoveUncalled(Rule):
    """Methods whose name is mentioned nowhere."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.mentioned = _mentioned(program.module)
        self.removed = False

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        noted = super().leave_FunctionDef(original_node, updated_node)
        name = original_node.name.value
        if not self.class_stack or self.function_stack or name.startswith("__") or name in CALLED:
            return noted
        if name in self.mentioned or original_node.decorators:
            return noted
        self.removed = True
        self.count("methods that nothing calls removed")
        return cst.RemoveFromParent()

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)


def _mentioned(module: cst.Module) -> set[str]:
    """Names after dots, and in strings."""
    found = {node.attr.value for node in m.findall(module, m.Attribute()) if isinstance(node, cst.Attribute)}
    for node in m.findall(module, m.SimpleString()):
        assert isinstance(node, cst.SimpleString)
        if isinstance(node.evaluated_value, str):
            found.add(node.evaluated_value)
    return found


def _reachable(program: Program) -> set[str]:
    """Names of top-level definitions that the entries need, transitively."""
    needs: dict[str, set[str]] = {}
    for statement in program.module.body:
        for name in bound_names(statement):
            needs.setdefault(name, set()).update(names_in(statement))
    found: set[str] = set()
    new = {name for _, name in program.entries}
    while new:
        found |= new
        new = {other for name in new for other in needs.get(name, ()) if other in needs} - found
    return found


def remove_unused(program: Program) -> None:
    for _ in range(6):
        rule = RemoveUncalled(program)
        module = program.module.visit(rule)
        program.module = module
        found = _reachable(program)
        body: list[Statement] = []
        for statement in module.body:
            names = bound_names(statement)
            if not names or set(names) & found:
                body.append(statement)
                continue
            program.done["definitions that nothing uses removed"] += 1
            rule.removed = True
        program.module = module.with_changes(body=body)
        if not rule.removed:
            return
