"""What only SGLang's engine asks a model for goes, and names of the module stand for what they were set to.

``_is_cuda = is_cuda()`` at the top of a file is a question to the engine like any other: it is asked in its place, so
that folding answers it. Methods for drafters, weight updates and overlapping batches have no counterpart.
"""

import libcst as cst
from libcst import matchers as m

from rtp_llm.port import sglang_facts
from rtp_llm.port.names import names_in
from rtp_llm.port.program import Program, code, self_attribute
from rtp_llm.port.rules.base import Rule, with_args
from rtp_llm.port.rules.fold import tidied
from rtp_llm.port.source import Origin, Statement, bound_names
from rtp_llm.port.visiting import Transformer

METHODS = frozenset({
    "forward_split_prefill", "get_embed_and_head", "set_embed_and_head", "get_embed", "set_embed",
    "load_kv_cache_scales",
    "set_eagle3_layers_to_capture", "set_dflash_layers_to_capture", "start_layer", "end_layer",
    "get_attention_sliding_window_size", "get_model_config_for_expert_location", "get_module_name_from_weight_name",
    "get_num_params", "get_hidden_dim", "get_input_embedding", "should_apply_lora", "get_weights_by_name",
    "get_moe_weights", "get_layer", "_load_weights_v2", "routed_experts_weights_of_layer", "get_stacked_params_mapping",
    "determine_num_fused_shared_experts",
})  # fmt: skip
# Methods by which a layer is told of kernels of the other engine; their calls do nothing here.
NOTIFICATIONS = frozenset({
    "stage_facts", "fuse_input_quant", "bind_runner_backend", "set_dp_buffer_len", "bind_entry", "bind_exit",
    "post_init",
})  # fmt: skip
ATTRIBUTES = frozenset({
    "default_bitsandbytes_target_modules", "bitsandbytes_stacked_params_mapping", "column_parallel_weights_modules",
    "supported_lora_modules", "embedding_modules", "embedding_padding_modules",
})  # fmt: skip
DECORATORS = frozenset({"supports_quantized_rl_reload", "register_custom_op", "is_nextn_model"})
_ENGINE_NAMES = frozenset({*sglang_facts.CALLS, *sglang_facts.NEGATIVE})
_ASKED = Origin("sglang.srt.utils", "is_npu")


class AskInPlace(Transformer):
    """Puts the questions that module names were set to in the place of the names."""

    def __init__(self, questions: dict[str, cst.BaseExpression]) -> None:
        self.questions = questions

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        return not isinstance(node.value, cst.Name) or node.value.value in self.questions

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        return updated_node.with_changes(keyword=original_node.keyword)

    def leave_AssignTarget(self, original_node: cst.AssignTarget, updated_node: cst.AssignTarget) -> cst.AssignTarget:
        return original_node

    def leave_Param(self, original_node: cst.Param, updated_node: cst.Param) -> cst.Param:
        return updated_node.with_changes(name=original_node.name)

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        return self.questions.get(updated_node.value, updated_node)


def _questions(program: Program) -> dict[str, cst.BaseExpression]:
    """Names at the top level that are set to questions about the engine, and to nothing else."""
    found: dict[str, list[cst.BaseExpression]] = {}
    for statement in program.module.body:
        if not m.matches(statement, m.SimpleStatementLine(body=[m.Assign(targets=[m.AssignTarget(m.Name())])])):
            continue
        assign = cst.ensure_type(cst.ensure_type(statement, cst.SimpleStatementLine).body[0], cst.Assign)
        name = cst.ensure_type(assign.targets[0].target, cst.Name).value
        found.setdefault(name, []).append(assign.value)
    questions: dict[str, cst.BaseExpression] = {}
    told = _set_on_other_devices(program)
    for name, values in found.items():
        if name in told and [code(value) for value in values] == ["False"]:
            program.engine_names.setdefault("is_npu", _ASKED)
            questions[name] = cst.Call(cst.Name("is_npu"))
            continue
        names = set().union(*(names_in(value) for value in values))
        asked = all(part in questions or program.engine_name(cst.Name(part)) in _ENGINE_NAMES for part in names)
        if len(values) == 1 and names and asked:
            value = values[0].visit(AskInPlace(questions))
            assert isinstance(value, cst.BaseExpression)
            is_open = isinstance(value, cst.BooleanOperation | cst.UnaryOperation) and not value.lpar
            questions[name] = value.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()]) if is_open else value
    return questions


def _set_on_other_devices(program: Program) -> set[str]:
    """Names that are set below a question at the top level, which this engine answers with no."""
    return {
        name
        for statement in program.module.body
        if isinstance(statement, cst.If | cst.Try)
        for name in bound_names(statement)
    }


class RemoveSglangShell(Rule):
    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        noted = super().leave_FunctionDef(original_node, updated_node)
        if self.class_stack and not self.function_stack and original_node.name.value in METHODS:
            self.count("engine's methods removed")
            return cst.RemoveFromParent()
        assert isinstance(noted, cst.FunctionDef)
        kept = [decorator for decorator in noted.decorators if not self._is_engines(decorator)]
        return noted.with_changes(decorators=kept) if len(kept) < len(noted.decorators) else noted

    def _is_engines(self, decorator: cst.Decorator) -> bool:
        node = decorator.decorator
        return self.program.engine_name(node.func if isinstance(node, cst.Call) else node) in DECORATORS

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        noted = super().leave_SimpleStatementLine(original_node, updated_node)
        small = original_node.body[0]
        if len(original_node.body) != 1:
            return noted
        called = m.Call(func=m.Attribute(attr=m.OneOf(*map(m.Name, sorted(NOTIFICATIONS)))))
        if m.matches(small, m.Expr(called) | m.Assign(value=called)):
            self.count("statements without effect removed")
            return cst.RemoveFromParent()
        in_class_body = bool(self.class_stack) and not self.function_stack
        if in_class_body and isinstance(small, cst.Assign) and code(small.targets[0].target) in ATTRIBUTES:
            self.count("engine's attributes removed")
            return cst.RemoveFromParent()
        return noted

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        """``hasattr(self.model, "start_layer")``, which asks for stages, is no."""
        if m.matches(updated_node, m.Call(func=m.Name("hasattr"), args=[m.Arg(), m.Arg(m.SimpleString())])):
            asked = cst.ensure_type(updated_node.args[1].value, cst.SimpleString).evaluated_value
            if asked in ("start_layer", "end_layer", "pp_group"):
                self.program.engine_names.setdefault("is_npu", _ASKED)
                return cst.Call(cst.Name("is_npu"))
        return updated_node

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)


class FinishKernels(Rule):
    """Calls of fused kernels become what they fuse; two branches that have become one are written once."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        func = updated_node.func
        if isinstance(func, cst.Attribute) and func.attr.value == "forward_decode" and len(updated_node.args) == 3:
            value = self.scope.attributes.value(self_attribute(func.value)) if self_attribute(func.value) else None
            if getattr(value, "path", "") == "fused_quant":
                return cst.Call(updated_node.args[1].value, [cst.Arg(updated_node.args[0].value)])
        if isinstance(func, cst.Attribute) and func.attr.value == "forward_native":
            return updated_node.with_changes(func=func.value)
        keywords = [arg.keyword.value if arg.keyword else "" for arg in updated_node.args]
        if "forward_batch" in keywords and self._is_linear(func):
            kept = [arg for arg, name in zip(updated_node.args, keywords, strict=True) if name != "forward_batch"]
            return with_args(updated_node, kept)
        return updated_node

    def _is_linear(self, func: cst.BaseExpression) -> bool:
        values = self.scope.attributes.assigned.get(self_attribute(func), []) if self_attribute(func) else []
        made = [value.func for value, _ in values if isinstance(value, cst.Call)]
        return bool(made) and all(self.program.engine_name(name).endswith("Linear") for name in made)

    def leave_If(self, original_node: cst.If, updated_node: cst.If):  # type: ignore[no-untyped-def]
        noted = super().leave_If(original_node, updated_node)
        branches = isinstance(updated_node.orelse, cst.Else) and isinstance(updated_node.body, cst.IndentedBlock)
        if branches and code(updated_node.body) == code(updated_node.orelse.body):  # type: ignore[union-attr]
            return cst.FlattenSentinel(updated_node.body.body)
        return noted


class FlagsNeverSet(Rule):
    """What is only ever set to False, since what set it to True has gone, is a question that is answered with no."""

    def leave_If(self, original_node: cst.If, updated_node: cst.If):  # type: ignore[no-untyped-def]
        noted = super().leave_If(original_node, updated_node)
        return noted.with_changes(test=self._asked(noted.test)) if isinstance(noted, cst.If) else noted

    def leave_IfExp(self, original_node: cst.IfExp, updated_node: cst.IfExp) -> cst.IfExp:
        return updated_node.with_changes(test=self._asked(updated_node.test))

    def leave_BooleanOperation(
        self, original_node: cst.BooleanOperation, updated_node: cst.BooleanOperation
    ) -> cst.BooleanOperation:
        return updated_node.with_changes(left=self._asked(updated_node.left), right=self._asked(updated_node.right))

    def leave_UnaryOperation(
        self, original_node: cst.UnaryOperation, updated_node: cst.UnaryOperation
    ) -> cst.UnaryOperation:
        return updated_node.with_changes(expression=self._asked(updated_node.expression))

    def _asked(self, node: cst.BaseExpression) -> cst.BaseExpression:
        if isinstance(node, cst.Name):
            values = self.scope.assigned.get(node.value, [])
        else:
            values = [value for value, _ in self.scope.attributes.assigned.get(self_attribute(node), [])]
        if not values or any(value is None or code(value) != "False" for value in values):
            return node
        self.program.engine_names.setdefault("is_npu", _ASKED)
        return cst.Call(cst.Name("is_npu"))


def answer_flags(program: Program) -> None:
    FlagsNeverSet.apply(program)


def remove_sglang_shell(program: Program) -> None:
    questions = _questions(program)
    body: list[Statement] = []
    for statement in program.module.body:
        target = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
        if not (isinstance(target, cst.Assign) and code(target.targets[0].target) in questions):
            body.append(statement)
    module = program.module.with_changes(body=body)
    program.module = cst.ensure_type(module.visit(AskInPlace(questions)), cst.Module)
    RemoveSglangShell.apply(program)


def finish_kernels(program: Program) -> None:
    FinishKernels.apply(program)
