"""Calls of SGLang's layers whose arguments or results differ here.

``self.topk = TopK(…)`` and ``self.experts = FusedMoE(…)`` become one layer that routes and computes; experts are not
summed over ranks there unless the model says so. ``a, b = get_rope_config(config)`` gives three values here;
``make_pp_layers`` gives a list. Names that mean another thing in vLLM's files are imported from where they mean the
same as in SGLang's.
"""

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.names import names_in
from rtp_llm.port.program import Program, code, lineage, self_attribute
from rtp_llm.port.rules.base import Rule, expression, keyword, with_args
from rtp_llm.port.rules.fold import tidied
from rtp_llm.port.rules.sglang_boundaries import REDUCE
from rtp_llm.port.source import Origin

LAYERS = "rtp_llm.srt.layers"
# Names of SGLang -> where they mean the same here.
HOMES: dict[str, Origin] = {
    "get_rope_config": Origin(f"{LAYERS}.rotary", "get_rope_config"),
    "Gemma3RMSNorm": Origin(f"{LAYERS}.layernorm", "GemmaRMSNorm"),
    "RotaryEmbedding": Origin(f"{LAYERS}.rotary", "RotaryEmbedding"),
    "MRotaryEmbedding": Origin(f"{LAYERS}.rotary", "MRotaryEmbedding"),
    "FusedMoE": Origin(f"{LAYERS}.fused_moe", "FusedMoEFactory"),
}
_LINEAR = frozenset({"tp_rank", "tp_size", "parallel_group", "use_dp_attention_reduce", "use_presharded_weights"})
DROPPED: dict[str, frozenset[str]] = {
    **{
        name: _LINEAR
        for name in (
            "ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear", "RowParallelLinear",
            "ReplicatedLinear",
        )
    },
    "VocabParallelEmbedding": frozenset({"use_attn_tp_group", "enable_tp", "padding_size", "use_presharded_weights"}),
    "ParallelLMHead": frozenset({"use_attn_tp_group", "padding_size", "use_presharded_weights"}),
    "make_layers": frozenset({"stage_facts", "pp_rank", "pp_size", "return_tuple", "offloader_kwargs"}),
    "make_pp_layers": frozenset({"stage_facts", "pp_rank", "pp_size", "return_tuple", "offloader_kwargs"}),
    "LogitsProcessor": frozenset({"skip_all_gather", "return_full_logits"}),
    "RadixAttention": frozenset({"orig_context_len"}),
}  # fmt: skip
EXPERTS = "FusedMoEFactory"
_ROUTING = {
    "top_k": "top_k", "renormalize": "renormalize", "use_grouped_topk": "use_grouped_topk",
    "num_expert_group": "num_expert_group", "topk_group": "topk_group", "scoring_func": "scoring_func",
    "correction_bias": "e_score_correction_bias", "custom_routing_function": "custom_routing_function",
    "routed_scaling_factor": "routed_scaling_factor",
}  # fmt: skip
_EXPERTS = frozenset({
    "num_experts", "hidden_size", "intermediate_size", "params_dtype", "quant_config", "prefix", "activation",
    "apply_router_weight_on_input", "reduce_results",
})  # fmt: skip


class SglangLayers(Rule):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.routings = {name: _routing(node, program) for name, node in program.classes().items()}

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        target, value = updated_node.targets[0].target, updated_node.value
        if not isinstance(value, cst.Call) or not isinstance(target, cst.Tuple):
            return updated_node
        if self.program.is_engine(value.func, "make_layers") or code(value.func) == "make_layers":
            return updated_node.with_changes(targets=[cst.AssignTarget(_assignable(target.elements[0].value))])
        if self.program.is_engine(value.func, "get_rope_config") and len(target.elements) == 2:
            names = ", ".join(code(part.value) for part in target.elements)
            parsed = cst.ensure_type(expression(f"({names}, _)"), cst.Tuple)
            return updated_node.with_changes(targets=[cst.AssignTarget(parsed.with_changes(lpar=[], rpar=[]))])
        return updated_node

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        name = self.program.engine_name(original_node.func)
        updated_node = self._without(updated_node, DROPPED.get(name, frozenset()))
        if name == "make_pp_layers":
            self.count("make_layers' tuple made a list")
            self.program.engine_names.setdefault("make_layers", Origin("sglang", "make_layers"))
            return updated_node.with_changes(func=cst.Name("make_layers"))
        if name == "RadixAttention":
            return self._attention(updated_node)
        if code(original_node.func) == "self.logits_processor" and len(updated_node.args) > 4:
            return with_args(updated_node, list(updated_node.args[:4]))
        if m.matches(updated_node.func, m.Attribute(attr=m.Name("make_expert_params_mapping"))):
            mapping = "fused_moe_make_expert_params_mapping"
            self.program.engine_names.setdefault(mapping, Origin("sglang", mapping))
            return with_args(updated_node, [cst.Arg(cst.Name("self")), *updated_node.args]).with_changes(
                func=cst.Name(mapping)
            )
        if self._is_experts(original_node.func):
            return self._experts(updated_node)
        if self._routes(original_node.func) and len(updated_node.args) >= 2:
            return updated_node.args[1].value
        return updated_node

    def _without(self, call: cst.Call, dropped: frozenset[str]) -> cst.Call:
        kept = [arg for arg in call.args if arg.keyword is None or arg.keyword.value not in dropped]
        return call if len(kept) == len(call.args) else with_args(call, kept)

    def _attention(self, call: cst.Call) -> cst.Call:
        """No soft cap is 0.0 here."""
        args = []
        for arg in call.args:
            is_cap = arg.keyword is not None and arg.keyword.value == "logit_cap"
            if is_cap and not isinstance(arg.value, cst.Float | cst.Integer):
                arg = arg.with_changes(value=expression(f"({code(arg.value)}) or 0.0"))
            args.append(arg)
        return call.with_changes(args=args)

    # Experts.

    def _is_experts(self, func: cst.BaseExpression) -> bool:
        is_chosen = isinstance(func, cst.Call) and self.program.is_engine(func.func, "get_moe_impl_class")
        return is_chosen or self.program.is_engine(func, "FusedMoE", "EPMoE", "DeepEPMoE")

    def _routes(self, func: cst.BaseExpression) -> bool:
        owner = self.class_stack[-1] if self.class_stack else ""
        routing = self.routings.get(owner)
        return routing is not None and self_attribute(func) == routing[0]

    def _experts(self, call: cst.Call) -> cst.Call:
        owner = self.class_stack[-1] if self.class_stack else ""
        routing = self.routings.get(owner)
        if routing is None:
            self.review("how these experts are chosen is not found: give FusedMoEFactory what TopK was given")
        given = {arg.keyword.value: arg.value for arg in (routing[1].args if routing else ()) if arg.keyword}
        values = {_ROUTING[name]: value for name, value in given.items() if name in _ROUTING}
        unknown = [name for name in given if name not in _ROUTING and name not in _NO_MATTER]
        for arg in call.args:
            name = arg.keyword.value if arg.keyword else ""
            if name in _EXPERTS:
                values[name] = arg.value
            elif name not in {*_ROUTING, *_NO_MATTER}:
                unknown.append(name or "a positional argument")
        if unknown:
            self.review(f"{', '.join(unknown)}: the experts here do not take this: say it in another way")
        if self._sums and "reduce_results" not in values:
            values["reduce_results"] = cst.Name("False")
        self.count("experts joined with their routing")
        self.program.engine_names.setdefault(EXPERTS, Origin("sglang", EXPERTS))
        args = [keyword(name, value) for name, value in values.items()]
        return with_args(call, args).with_changes(func=cst.Name(EXPERTS))

    @property
    def _sums(self) -> bool:
        node = self.program.classes().get(self.class_stack[-1]) if self.class_stack else None
        return node is not None and bool(m.findall(node, m.Call(func=m.Name(REDUCE))))

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        noted = super().leave_SimpleStatementLine(original_node, updated_node)
        small = original_node.body[0]
        routing = self.routings.get(self.class_stack[-1]) if self.class_stack else None
        is_routing = isinstance(small, cst.Assign) and routing is not None and small.value is routing[1]
        return cst.RemoveFromParent() if is_routing else noted

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)


# What only tells the other engine which kernels to take, or what is told elsewhere.
_NO_MATTER = frozenset({
    "layer_id", "inplace", "num_fused_shared_experts", "routing_method_type", "tp_size", "with_bias", "output_format",
    "apply_routed_scaling_factor_on_output", "fused_shared_experts_scaling_factor", "num_local_experts",
    "enable_qwen35_fp8_deferred_finalize",
})  # fmt: skip


def _routing(node: cst.ClassDef, program: Program) -> tuple[str, cst.Call] | None:
    """Return the attribute and the call of a class's ``TopK``, if it has one."""
    for found in m.findall(node, m.Assign(value=m.Call())):
        assign = cst.ensure_type(found, cst.Assign)
        call = cst.ensure_type(assign.value, cst.Call)
        if program.is_engine(call.func, "TopK"):
            return self_attribute(assign.targets[0].target), call
    return None


def _assignable(node: cst.BaseExpression) -> cst.BaseAssignTargetExpression:
    assert isinstance(node, cst.BaseAssignTargetExpression)
    return node


class KeepOneLoader(Rule):
    """Parts load their weights by the outermost ``load_weights`` alone, unless something calls theirs."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        calls = m.findall(program.module, m.Call(func=m.Attribute(attr=m.Name("load_weights"))))
        self.called = bool(calls) or "AutoWeightsLoader" in names_in(program.module)
        self.tops = {name for _, name in program.entries}

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        noted = super().leave_FunctionDef(original_node, updated_node)
        is_part = bool(self.class_stack) and not self.function_stack and not self._is_top(self.class_stack[-1])
        if is_part and original_node.name.value == "load_weights" and not self.called:
            return cst.RemoveFromParent()
        return noted

    def _is_top(self, name: str) -> bool:
        """Whether an entry is a class or inherits from it."""
        classes = self.program.classes()
        return any(node.name.value == name for top in self.tops for node in lineage(top, classes))

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)


def keep_one_loader(program: Program) -> None:
    KeepOneLoader.apply(program)


def rewrite_sglang_layers(program: Program) -> None:
    SglangLayers.apply(program)
    for local in list(program.engine_names):
        home = HOMES.get(program.engine_name(cst.Name(local)))
        if home is not None:
            del program.engine_names[local]
            program.imports[local] = home
