"""Calls of layers and helpers whose arguments, results or defaults differ here.

``start, end, layers = make_layers(n, lambda prefix: …)`` becomes ``layers = make_layers(n, lambda idx, prefix: …)``;
``maybe_prefix(prefix, "x")`` and ``f"{prefix}.x"`` become ``add_prefix("x", prefix)``; ``GeluAndMul()`` names its
default, which differs; options that only steer the other engine go.
"""

from typing import cast

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.names import names_in
from rtp_llm.port.program import Program, code, self_attribute
from rtp_llm.port.rules.base import Rule, keyword, with_args
from rtp_llm.port.rules.calls import NamedCall
from rtp_llm.port.rules.fold import tidied
from rtp_llm.port.signatures import DROPPED, DROPPED_OF_SGLANG, SIGNATURES
from rtp_llm.port.source import Origin
from rtp_llm.port.vocabulary import target

# Helpers that give back their first argument here.
_IDENTITIES = frozenset({"maybe_remap_moe_expert_param_name", "remap_moe_expert_weights"})
# Helpers of one line: how many arguments they have, and an expression of these.
_WRITTEN_OUT = {
    "cdiv": (2, "-(-({}) // ({}))"),
    "round_up": (2, "-(-({0}) // ({1})) * ({1})"),
    "getattr_iter": (2, "next((getattr({0}, name) for name in {1} if hasattr({0}, name)), None)"),
    "str_dtype_to_torch_dtype": (1, "getattr(torch, {})"),
}
_EXPERTS_OF_THEIRS, _EXPERTS_OF_OURS = ".experts.routed_experts.", ".experts."
_MODULES = frozenset({"parallel_state", "utils"})  # of vllm.distributed
_STAGES = ("pp_rank", "pp_size", "return_tuple")
_ADD_PREFIX = Origin("vllm", "add_prefix")
_NORMALISED = frozenset(SIGNATURES) - {
    "Attention",
    "make_layers",
    "RMSNorm",
    "LayerNorm",
    "get_rope",
    "LogitsProcessor",
}


class RewriteLayers(Rule):
    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        target, value = updated_node.targets[0].target, updated_node.value
        is_call = isinstance(value, cst.Call) and self.program.is_engine(value.func, "make_layers")
        if not is_call or not isinstance(target, cst.Tuple) or len(target.elements) != 3:
            return updated_node
        self.count("make_layers' tuple made a list")
        place = 2 if self.program.engine == "vllm" else 0  # the layers stand last there, and first in SGLang
        return updated_node.with_changes(targets=[_target(target.elements[place].value)])

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        name = self.program.engine_name(original_node.func)
        if name == "make_layers" and self.program.engine == "sglang":
            kept = [arg for arg in updated_node.args if not (arg.keyword and arg.keyword.value in _STAGES)]
            return with_args(updated_node, kept)
        if name == "make_layers":
            return self._make_layers(updated_node)
        if name == "maybe_prefix" and len(updated_node.args) == 2:
            prefix, part = (arg.value for arg in updated_node.args)
            return self._add_prefix(part, prefix)
        if name == "maybe_fused_act_quant" and len(updated_node.args) >= 2:
            return cst.Call(updated_node.args[0].value, [cst.Arg(updated_node.args[1].value)])
        if name in _WRITTEN_OUT and len(updated_node.args) == _WRITTEN_OUT[name][0]:
            return self._written_out(name, updated_node)
        if name == "async_tensor_h2d" and updated_node.args:
            self.program.imports.setdefault("torch", Origin("torch"))
            device = next((arg for arg in updated_node.args[1:] if not arg.keyword), None)
            rest = [keyword("device", device.value)] if device else []
            kept = [updated_node.args[0], *rest, *(arg for arg in updated_node.args[1:] if arg.keyword)]
            return with_args(updated_node.with_changes(func=cst.parse_expression("torch.as_tensor")), kept)
        if name in _IDENTITIES and updated_node.args:
            return updated_node.args[0].value
        if name == "GeluAndMul" and self.program.engine == "vllm" and not updated_node.args:
            self.count("GeluAndMul's default named")
            return updated_node.with_changes(args=[cst.Arg(cst.SimpleString('"none"'))])
        if _is_native_call(original_node.func):
            self.count("forward_native called as the module")
            return updated_node.with_changes(func=cst.ensure_type(updated_node.func, cst.Attribute).value)
        if self.program.engine == "sglang" and name in DROPPED_OF_SGLANG:
            dropped = DROPPED_OF_SGLANG[name]
            kept = [arg for arg in updated_node.args if not (arg.keyword and arg.keyword.value in dropped)]
            return updated_node if len(kept) == len(updated_node.args) else with_args(updated_node, kept)
        if self.program.engine == "vllm" and (name in DROPPED or name in _NORMALISED):
            return self._options(name, updated_node)
        if isinstance(original_node.func, cst.Name):
            return self._slices(original_node.func.value, updated_node)
        return updated_node

    def _written_out(self, name: str, call: cst.Call) -> cst.BaseExpression:
        self.count("small helpers written out")
        text = _WRITTEN_OUT[name][1].format(*(code(arg.value) for arg in call.args))
        node = cst.parse_expression(text)
        if "torch" in names_in(node):
            self.program.imports.setdefault("torch", Origin("torch"))
        return node

    def _make_layers(self, call: cst.Call) -> cst.Call:
        named = NamedCall.of(call, "make_layers")
        function = named.value("layer_fn") if named else None
        if named is None or function is None:
            self.review("make_layers is called in a way that is not known")
            return call
        names = [param.name.value for param in function.params.params] if isinstance(function, cst.Lambda) else []
        if isinstance(function, cst.Lambda) and names[:1] == ["prefix"]:
            idx = cst.Param(cst.Name("idx"), comma=cst.Comma(whitespace_after=cst.SimpleWhitespace(" ")))
            params = function.params.with_changes(params=[idx, *function.params.params])
            new: cst.BaseExpression = function.with_changes(
                params=params, whitespace_after_lambda=cst.SimpleWhitespace(" ")
            )
        elif isinstance(function, cst.Lambda):
            self.review("make_layers calls this function with idx and prefix")
            return call
        else:
            new = cst.parse_expression(f"lambda idx, prefix: {_callable(function)}(prefix=prefix)")
        position = list(named.values).index("layer_fn")
        args = list(call.args)
        args[position] = args[position].with_changes(value=new)
        self.count("make_layers gives the layer's number")
        return call.with_changes(args=args)

    def _add_prefix(self, part: cst.BaseExpression, prefix: cst.BaseExpression) -> cst.Call:
        self.program.engine_names.setdefault("add_prefix", _ADD_PREFIX)
        self.count("prefixes joined by add_prefix")
        comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        return cst.Call(cst.Name("add_prefix"), [cst.Arg(part, comma=comma), cst.Arg(prefix)])

    def leave_FormattedString(
        self, original_node: cst.FormattedString, updated_node: cst.FormattedString
    ) -> cst.BaseExpression:
        """``f"{prefix}.rest"``, of the module's own prefix."""
        parts = updated_node.parts
        if len(parts) < 2 or not isinstance(parts[0], cst.FormattedStringExpression):
            return updated_node
        first, second = parts[0].expression, parts[1]
        is_prefix = isinstance(first, cst.Name) and first.value == "prefix" and parts[0].format_spec is None
        if not is_prefix or not isinstance(second, cst.FormattedStringText) or not second.value.startswith("."):
            return updated_node
        rest = [second.with_changes(value=second.value[1:]), *parts[2:]]
        if len(rest) == 1:
            part: cst.BaseExpression = cst.SimpleString(f'"{second.value[1:]}"')
        else:
            part = updated_node.with_changes(parts=[piece for piece in rest if code(piece)])
        return self._add_prefix(part, cst.Name("prefix"))

    def _options(self, name: str, call: cst.Call) -> cst.Call:
        named = NamedCall.of(call, name)
        if named is None:
            self.review(f"more positional arguments than {name} is known to take: name them")
            return call
        dropped = named.drop(*DROPPED.get(name, ()))
        if dropped:
            self.count("options of the other engine removed")
        if not dropped and all(arg.keyword for arg in call.args[2:]):
            return call
        return named.written()

    def _slices(self, function: str, call: cst.Call) -> cst.BaseExpression:
        """Loops over this stage's layers become loops over all."""
        args = call.args
        if function == "islice" and len(args) == 3 and self_attribute(args[2].value) == "end_layer":
            self.count("loops over a stage's layers made loops over all")
            return args[0].value
        if function == "enumerate" and len(args) == 2 and code(args[1].value) == "0":
            return with_args(call, [args[0]])
        return call

    def leave_SimpleString(self, original_node: cst.SimpleString, updated_node: cst.SimpleString) -> cst.SimpleString:
        """Experts' weights are parameters of the layer itself here."""
        if _EXPERTS_OF_THEIRS not in updated_node.value:
            return updated_node
        self.count("names of experts' weights")
        return updated_node.with_changes(value=updated_node.value.replace(_EXPERTS_OF_THEIRS, _EXPERTS_OF_OURS))

    def leave_FormattedStringText(
        self, original_node: cst.FormattedStringText, updated_node: cst.FormattedStringText
    ) -> cst.FormattedStringText:
        """The same within f-strings."""
        if _EXPERTS_OF_THEIRS in updated_node.value:
            self.count("names of experts' weights")
        return updated_node.with_changes(value=updated_node.value.replace(_EXPERTS_OF_THEIRS, _EXPERTS_OF_OURS))

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        """``parallel_state.get_tensor_model_parallel_rank`` of an imported module is the name itself."""
        name = updated_node.attr.value
        if self.program.engine_name(original_node.value) not in _MODULES or target(name) is None:
            return updated_node
        self.program.engine_names.setdefault(name, Origin("vllm", name))
        return cst.Name(name)

    def leave_Subscript(self, original_node: cst.Subscript, updated_node: cst.Subscript) -> cst.BaseExpression:
        index = updated_node.slice[0].slice if len(updated_node.slice) == 1 else None
        if isinstance(index, cst.Index) and self.program.is_engine(updated_node.value, "_ACTIVATION_REGISTRY"):
            self.program.engine_names.setdefault("get_act_fn", Origin("vllm", "get_act_fn"))
            return cst.Call(cst.Name("get_act_fn"), [cst.Arg(index.value)])
        if not isinstance(index, cst.Slice) or index.upper is None or self_attribute(index.upper) != "end_layer":
            return updated_node
        return updated_node.value if index.lower is None or code(index.lower) == "0" else updated_node


class CountLayers(Rule):
    """What is left of ``end_layer`` is the number of layers; what sets it goes."""

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        noted = super().leave_SimpleStatementLine(original_node, updated_node)
        sets = m.Assign(targets=[m.AssignTarget(m.Attribute(attr=m.Name("end_layer")))])
        return cst.RemoveFromParent() if m.matches(original_node.body[0], sets) else noted

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        if updated_node.attr.value != "end_layer":
            return updated_node
        layers = updated_node.with_changes(attr=cst.Name("layers"))
        return cst.Call(cst.Name("len"), [cst.Arg(layers)])


class TieHeads(Rule):
    """``self.lm_head = self.lm_head.tie_weights(embedding)`` becomes the embedding itself; also without the result."""

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        noted = super().leave_SimpleStatementLine(original_node, updated_node)
        call = m.findall(original_node, m.Call(func=m.Attribute(attr=m.Name("tie_weights"))))
        if len(call) != 1 or not isinstance(call[0], cst.Call) or len(call[0].args) != 1:
            return noted
        func = cst.ensure_type(call[0].func, cst.Attribute)
        self.count("tied heads made the embedding itself")
        assign = cst.Assign([_target(func.value)], call[0].args[0].value)
        return cst.ensure_type(noted, cst.SimpleStatementLine).with_changes(body=[assign])


def _is_native_call(func: cst.BaseExpression) -> bool:
    """Whether a function is the variant of another module's ``forward`` in plain torch."""
    is_native = isinstance(func, cst.Attribute) and func.attr.value == "forward_native"
    return is_native and code(cst.ensure_type(func, cst.Attribute).value) not in ("self", "super()")


def _target(node: cst.BaseExpression) -> cst.AssignTarget:
    return cst.AssignTarget(cast(cst.BaseAssignTargetExpression, node))


def _callable(function: cst.BaseExpression) -> str:
    text = code(function)
    return text if isinstance(function, cst.Name | cst.Attribute | cst.Call) else f"({text})"


def rewrite_layers(program: Program) -> None:
    RewriteLayers.apply(program)
    CountLayers.apply(program)
    TieHeads.apply(program)


def count_layers(program: Program) -> None:
    CountLayers.apply(program)
