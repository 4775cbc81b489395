"""``Attention(…)`` becomes ``RadixAttention(…)`` with its layer's number, its window and its other arguments' names.

Traps: vLLM's ``per_layer_sliding_window`` counts the token itself, as ``window`` does here (``sliding_window_size``
does not). Without it, vLLM's attention takes the window of the cache's configuration, which is the model's if all
layers share it: ``model_window(config)``. A class without the configuration is given the window where it was given
the cache's.
"""

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.facts import Engine
from rtp_llm.port.program import Program, code, lineage, methods, parameters
from rtp_llm.port.report import NOT_PORTABLE
from rtp_llm.port.rules.base import Rule, keyword, with_args
from rtp_llm.port.rules.calls import NamedCall
from rtp_llm.port.scopes import Scopes
from rtp_llm.port.source import Origin
from rtp_llm.port.values import engine_parameter, evaluate
from rtp_llm.port.visiting import Transformer

CACHE = Engine("vllm_config.cache_config")
_ENGINE_ONLY = ("cache_config", "attn_backend", "mm_prefix_clamp_sliding_window", "layer_name")
# Arguments that RadixAttention takes at the call, or in another form: the layer of vLLM's name has them.
_COMPATIBLE = frozenset({"chunk_lookback", "kv_sharing_target_layer_name", "sinks", "use_alibi_sqrt"})
_UNPORTED_KWARGS = ("dual_chunk_attention_config", "layer_idx")


class Windows:
    """How each class learns the window that the model's layers share.

    A class that has the configuration asks it. One that has not, but the cache's, is a carrier: it gets the window as
    an argument in the same place.
    """

    def __init__(self, program: Program, scopes: Scopes) -> None:
        self.program = program
        self.scopes = scopes
        self.classes = program.classes()
        self.carriers: set[str] = set()
        while True:
            new = {name for name in self.classes if name not in self.carriers and self._must_carry(name)}
            if not new:
                break
            self.carriers |= new

    def _must_carry(self, name: str) -> bool:
        init = methods(self.classes[name]).get("__init__")
        if init is None or not _cache_parameter(init, self.program) or self._config(name, init):
            return False
        return any(
            self.program.is_engine(call.func, "Attention") or self.is_carrier(call, name)
            for call in m.findall(init.body, m.Call())
            if isinstance(call, cst.Call)
        )

    def is_carrier(self, call: cst.Call, owner: str) -> bool:
        """Whether a call constructs a carrier: by its name, or as the base class."""
        if isinstance(call.func, cst.Name):
            return call.func.value in self.carriers
        if code(call.func) == "super().__init__":
            return any(node.name.value in self.carriers for node in lineage(owner, self.classes)[1:2])
        return False

    def expression(self, owner: str, function: cst.FunctionDef) -> str | None:
        """Return the code of the window that all layers share; None if it is not at hand."""
        config = self._config(owner, function)
        if config:
            self.program.engine_names.setdefault("model_window", Origin("vllm", "model_window"))
            return f"model_window({config})"
        return "window" if owner in self.carriers else None

    def _config(self, owner: str, function: cst.FunctionDef) -> str:
        """Return how the configuration is called in a function; "" if it is not at hand."""
        names = [param.name.value for param in parameters(function)]
        scope = self.scopes.at(function)
        if "config" in names or "vllm_config" in names or scope.is_local("config"):
            return "config"
        if "config" in scope.attributes.assigned:
            return "self.config"
        return next((name for name in names if name.endswith("_config") and name not in _NOT_THE_MODELS), "")


_NOT_THE_MODELS = ("cache_config", "quant_config", "dual_chunk_attention_config", "parallel_config", "lora_config")


def _cache_parameter(function: cst.FunctionDef, program: Program) -> bool:
    return any(engine_parameter(param, program) == CACHE for param in parameters(function))


class _WindowParameter(Transformer):
    """``cache_config`` becomes ``window: int | None = None``."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def leave_Param(self, original_node: cst.Param, updated_node: cst.Param) -> cst.Param:
        if engine_parameter(original_node, self.program) != CACHE:
            return updated_node
        annotation = cst.Annotation(cst.parse_expression("int | None"))
        return updated_node.with_changes(name=cst.Name("window"), annotation=annotation)


class RewriteAttention(Rule):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.windows = Windows(program, self.scopes)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if not self.program.is_engine(original_node.func, "Attention"):
            return self._hand_on(original_node, updated_node)
        call = NamedCall.of(updated_node, "Attention")
        if call is None:
            self.review("more positional arguments than Attention is known to take: name them")
            return updated_node
        call.stars = [star for star in call.stars if not self._is_left_out(star)]
        self._whatever_is_constant(call)
        self._window(call, original_node)
        call.drop(*_ENGINE_ONLY)
        if call.stars or not call.values.keys().isdisjoint(_COMPATIBLE):
            self.count("Attention given no cache configuration")
            call.rename("window", "per_layer_sliding_window")
            return call.written(3)
        self.count("Attention made RadixAttention")
        if "num_kv_heads" not in call.values:
            call.set("num_kv_heads", call.values["num_heads"].value)
        call.rename("logits_soft_cap", "logit_cap")
        if "logit_cap" in call.values:
            self._soft_cap(call)
        for theirs, ours in (("head_size_v", "v_head_dim"), ("head_size", "head_dim"), ("scale", "scaling")):
            call.rename(theirs, ours)
        call.set("layer_id", self._layer_id(call))
        self.program.engine_names.setdefault("RadixAttention", Origin("vllm", "RadixAttention"))
        return call.written(3, cst.Name("RadixAttention"))

    def _is_left_out(self, star: cst.Arg) -> bool:
        """Whether ``**extra`` can only hold arguments that have no meaning here."""
        keys = m.findall(star.value, m.DictElement(key=m.SimpleString()))
        if isinstance(star.value, cst.Name):
            found = self.scope.assigned.get(star.value.value, [])
            keys = [key for node in found if node is not None for key in m.findall(node, m.DictElement())]
        names = [
            key.key.evaluated_value
            for key in keys
            if isinstance(key, cst.DictElement) and isinstance(key.key, cst.SimpleString)
        ]
        return bool(keys) and all(name in _UNPORTED_KWARGS for name in names)

    def _window(self, call: NamedCall, original: cst.Call) -> None:
        own = call.value("per_layer_sliding_window")
        call.rename("per_layer_sliding_window", "window")
        named = NamedCall.of(original, "Attention")
        cache = named.value("cache_config") if named else None
        if own is not None:
            self.count("windows written as window=")
        if cache is None or not isinstance(evaluate(cache, self.scope), Engine):
            return
        model = self.windows.expression(self.class_stack[-1] if self.class_stack else "", self.function_stack[-1])
        if model is None:
            self.review(
                "no window is given, so the model's own counts, if its configuration has one for all layers: hand "
                "window=model_window(config) down to here"
            )
        elif own is not None and model.startswith("model_window("):
            call.set("window", f"{model[:-1]}, {code(own)})")
        elif own is not None:
            call.set("window", f"{model} if {code(own)} is None else {code(own)}")
        else:
            call.set("window", model)

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        if (
            self.class_stack
            and self.class_stack[-1] in self.windows.carriers
            and original_node.name.value == "__init__"
        ):
            updated_node = updated_node.with_changes(params=updated_node.params.visit(_WindowParameter(self.program)))
        return super().leave_FunctionDef(original_node, updated_node)

    def _hand_on(self, original: cst.Call, updated: cst.Call) -> cst.Call:
        """A class that cannot ask the configuration is given the window where it was given the cache's."""
        if (
            not self.class_stack
            or not self.function_stack
            or not self.windows.is_carrier(original, self.class_stack[-1])
        ):
            return updated
        model = self.windows.expression(self.class_stack[-1], self.function_stack[-1])
        args = list(updated.args)
        for position, arg in enumerate(original.args):
            if model is not None and evaluate(arg.value, self.scope) == CACHE:
                args[position] = keyword("window", model) if arg.keyword else cst.Arg(cst.parse_expression(model))
        return with_args(updated, args)

    def _soft_cap(self, call: NamedCall) -> None:
        """vLLM's None is 0.0 here."""
        value = call.values["logit_cap"].value
        if not isinstance(value, cst.Float | cst.Integer):
            call.set("logit_cap", f"{_wrapped(value)} or 0.0")

    def _layer_id(self, call: NamedCall) -> str:
        prefix = call.value("prefix")
        self.program.engine_names.setdefault("extract_layer_index", Origin("vllm", "extract_layer_index"))
        if prefix is None:
            self.review("this attention has no prefix, which would tell its layer: give layer_id the layer's number")
            return "extract_layer_index(prefix)"
        if _num_expressions(prefix) > 1:  # one of several of the block
            self.program.engine_names.setdefault("cache_number", Origin("vllm", "cache_number"))
            return f"cache_number({code(prefix)})"
        base = _prefix_base(prefix)
        return f"extract_layer_index({base})"

    def _whatever_is_constant(self, call: NamedCall) -> None:
        if "kv_sharing_target_layer_name" in call.values:
            value = call.values["kv_sharing_target_layer_name"].value
            if code(value) == "None":
                call.drop("kv_sharing_target_layer_name")
        if code(call.value("use_alibi_sqrt") or cst.Name("False")) in ("False", "None"):
            call.drop("use_alibi_sqrt")
        else:
            self.review(f"{NOT_PORTABLE}use_alibi_sqrt needs scores that are lowered by the root of the distance")
        if "attn_type" in call.values and code(call.values["attn_type"].value) == "AttentionType.DECODER":
            call.drop("attn_type")


def _wrapped(node: cst.BaseExpression) -> str:
    text = code(node)
    return text if isinstance(node, cst.Name | cst.Attribute | cst.Call) else f"({text})"


def _num_expressions(prefix: cst.BaseExpression) -> int:
    """Return how many values stand in ``f"{prefix}.attn.{i}"``."""
    parts = prefix.parts if isinstance(prefix, cst.FormattedString) else ()
    return sum(isinstance(part, cst.FormattedStringExpression) for part in parts)


def _prefix_base(prefix: cst.BaseExpression) -> str:
    """Return the module's own prefix in ``f"{prefix}.attn"`` and the like; the whole expression otherwise."""
    if isinstance(prefix, cst.FormattedString) and prefix.parts:
        first = prefix.parts[0]
        if isinstance(first, cst.FormattedStringExpression) and isinstance(first.expression, cst.Name):
            return first.expression.value
    if isinstance(prefix, cst.Call) and len(prefix.args) == 2:
        names = [code(arg.value) for arg in prefix.args if isinstance(arg.value, cst.Name)]
        if len(names) == 1:
            return names[0]
    return code(prefix)


def rewrite_attention(program: Program) -> None:
    RewriteAttention.apply(program)
