"""Constructors take ``config`` and ``quant_config`` in place of the other engine's configuration.

``__init__(self, *, vllm_config, prefix="")`` becomes ``__init__(self, config, quant_config=None, prefix="")``; caches,
schedulers and options of the other engine go, and with them the arguments at every call.
"""

from collections.abc import Sequence

import libcst as cst

from rtp_llm.port.facts import FACTORIES, Const, Engine, is_part
from rtp_llm.port.program import Program, code, lineage, methods, parameters, self_attribute
from rtp_llm.port.rules.base import Rule, keyword, with_args
from rtp_llm.port.rules.fold import tidied
from rtp_llm.port.signatures import SIGNATURES, WHOLE
from rtp_llm.port.source import Origin
from rtp_llm.port.values import engine_parameter, evaluate

ROOT = Engine("vllm_config")
_BUILTINS = frozenset({"getattr", "hasattr", "isinstance", "len", "print", "str", "repr", "type"})


class RewriteConstructors(Rule):
    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        params = original_node.params
        engine = {param.name.value for param in parameters(original_node) if engine_parameter(param, self.program)}
        if engine:
            self.count("constructors rewritten")
            updated_node = updated_node.with_changes(params=self._parameters(params, updated_node.params, engine))
        return super().leave_FunctionDef(original_node, updated_node)

    def _parameters(self, old: cst.Parameters, new: cst.Parameters, engine: set[str]) -> cst.Parameters:
        has_root = any(engine_parameter(param, self.program) == ROOT for param in (*old.params, *old.kwonly_params))
        if not has_root:
            named = _kept(new.kwonly_params, engine)
            star = new.star_arg if named or not new.kwonly_params else _plain_star(new.star_arg)
            return new.with_changes(params=_kept(new.params, engine), kwonly_params=named, star_arg=star)
        merged: list[cst.Param] = []
        given = {param.name.value: param for param in (*new.params, *new.kwonly_params)}
        for param in (*old.params, *old.kwonly_params):
            name = param.name.value
            if engine_parameter(param, self.program) == ROOT:
                merged += [self._config(given.get("config")), self._quant_config(given.get("quant_config"))]
            elif name not in engine and name not in ("config", "quant_config"):
                merged.append(given[name])
        merged = _with_valid_defaults(merged)
        return new.with_changes(params=_comma_free(merged), kwonly_params=[], star_arg=_plain_star(new.star_arg))

    def _config(self, present: cst.Param | None) -> cst.Param:
        self.program.imports.setdefault("PretrainedConfig", Origin("transformers", "PretrainedConfig"))
        annotation = cst.Annotation(cst.Name("PretrainedConfig"))
        return cst.Param(cst.Name("config"), annotation=annotation)

    def _quant_config(self, present: cst.Param | None) -> cst.Param:
        self.program.engine_names.setdefault("QuantizationConfig", Origin("vllm", "QuantizationConfig"))
        annotation = cst.Annotation(cst.parse_expression("QuantizationConfig | None"))
        return cst.Param(cst.Name("quant_config"), annotation=annotation, default=cst.Name("None"))

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        """What is assigned a part of the other engine goes; a setting of it is told."""
        small = original_node.body[0]
        value = small.value if isinstance(small, cst.Assign | cst.AnnAssign) else None
        found = None if value is None else evaluate(value, self.scope)
        if isinstance(found, Engine) and not is_part(found):
            self.review(f"{found.path} is a setting of the other engine: give its value, or remove what needs it")
        noted = super().leave_SimpleStatementLine(original_node, updated_node)
        if isinstance(small, cst.Assign) and self_attribute(small.targets[0].target) in FACTORIES:
            return cst.RemoveFromParent()
        if not is_part(found) or len(original_node.body) != 1:
            return noted
        self.count("statements without effect removed")
        return cst.RemoveFromParent()

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        if isinstance(original_node.func, cst.Name) and original_node.func.value in _BUILTINS:
            return updated_node
        names = self._callee_parameters(original_node)
        given = {arg.keyword.value for arg in original_node.args if arg.keyword}
        num_positional = sum(arg.keyword is None and not arg.star for arg in original_node.args)
        merged = self._merged(names, num_positional) if names else {}
        args: list[cst.Arg] = []
        for position, (old, new) in enumerate(zip(original_node.args, updated_node.args, strict=True)):
            if position in merged.values():
                continue  # it stands in the place of the whole configuration
            replaced = self._argument(old, new, names[position] if position < len(names) else None, given)
            if replaced is not None and len(replaced) > 1:
                for place, name in enumerate(("config", "quant_config")):
                    if name in merged:
                        value = updated_node.args[merged[name]].value
                        replaced[place] = keyword(name, value) if old.keyword else cst.Arg(value)
            args += [new] if replaced is None else replaced
        if [code(arg) for arg in args] == [code(arg) for arg in updated_node.args]:
            return updated_node
        return with_args(updated_node, args)

    def _merged(self, names: list[cst.Param], num_positional: int) -> dict[str, int]:
        """Parameters of a callee that takes the whole configuration, and these beside it -> their places."""
        if not any(engine_parameter(param, self.program) == ROOT for param in names):
            return {}
        places = {param.name.value: place for place, param in enumerate(names)}
        wanted = [name for name in ("config", "quant_config") if name in places]
        return {name: places[name] for name in wanted if places[name] < num_positional}

    def _argument(
        self, old: cst.Arg, new: cst.Arg, parameter: cst.Param | None, given: set[str]
    ) -> list[cst.Arg] | None:
        """Return what an argument becomes; None: what it is."""
        value = evaluate(old.value, self.scope)
        name = old.keyword.value if old.keyword else None
        config, quant_config = self._root_names(old.value, value)
        if config:
            if name is None:
                texts = [config] if "quant_config" in given else [config, quant_config]
                return [cst.Arg(cst.parse_expression(text)) for text in texts]
            pairs = {"config": config, "quant_config": quant_config}
            return [keyword(key, text) for key, text in pairs.items() if key not in given]
        if is_part(value) and old.star == "":
            return []
        probe = cst.Param(cst.Name(name)) if name else parameter
        if probe is not None and old.star == "":
            of_engine = engine_parameter(probe, self.program)
            if isinstance(of_engine, Const) or (of_engine is not None and of_engine != ROOT):
                return []
        return None

    def _root_names(self, node: cst.BaseExpression, value: object) -> tuple[str, str]:
        """Return the expressions for ``config`` and ``quant_config`` where the whole configuration is handed on."""
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute) and node.args:
            base = evaluate(node.func.value, self.scope)
            if node.func.attr.value == "with_hf_config" and isinstance(base, Engine) and base.path == "vllm_config":
                owner = "self." if base.owner == "self." else ""
                return code(node.args[0].value), f"{owner}quant_config"
        if not isinstance(value, Engine) or value.path != "vllm_config":
            return "", ""
        owner = "self." if value.owner == "self." else ""
        return f"{owner}config", f"{owner}quant_config"

    def _callee_parameters(self, call: cst.Call) -> list[cst.Param]:
        """Return the parameters that a call's positional arguments go to, as far as the callee is known."""
        classes = self.program.classes()
        func, name, method = call.func, "", "__init__"
        layer = self.program.engine_name(func)
        if layer in WHOLE:
            return [cst.Param(cst.Name(parameter)) for parameter in SIGNATURES[layer]]
        if isinstance(func, cst.Name) and func.value in classes:
            name = func.value
        elif self_attribute(func) and self.class_stack:
            name, method = self.class_stack[-1], self_attribute(func)
        elif isinstance(func, cst.Attribute) and code(func.value) == "super()" and self.class_stack:
            bases = lineage(self.class_stack[-1], classes)[1:]
            name, method = (bases[0].name.value if bases else ""), func.attr.value
        for node in lineage(name, classes):
            if method in methods(node):
                return [param for param in methods(node)[method].params.params if param.name.value != "self"]
        return []


def _kept(params: Sequence[cst.Param], dropped: set[str]) -> list[cst.Param]:
    """The others; the last one ends the line as the last one did."""
    kept = [param for param in params if param.name.value not in dropped]
    if kept and len(kept) < len(params):
        last = params[-1]
        kept[-1] = kept[-1].with_changes(comma=last.comma, whitespace_after_param=last.whitespace_after_param)
    return kept


def _with_valid_defaults(params: list[cst.Param]) -> list[cst.Param]:
    """``quant_config`` has no default if a parameter after it has none; ``config`` comes before all that have one."""
    names = [param.name.value for param in params]
    place = names.index("quant_config")
    if any(param.default is None for param in params[place + 1 :]):
        params[place] = params[place].with_changes(default=None)
    with_default = [param for param in params if param.default is not None]
    return [param for param in params if param.default is None] + with_default


def _comma_free(params: list[cst.Param]) -> list[cst.Param]:
    """Keep the commas with their line breaks between parameters; the new ones get those of their neighbours."""
    between = next((param.comma for param in params if isinstance(param.comma, cst.Comma)), cst.MaybeSentinel.DEFAULT)
    result = [param.with_changes(comma=between, star=cst.MaybeSentinel.DEFAULT) for param in params]
    last = params[-1].comma if isinstance(params[-1].comma, cst.Comma) else cst.MaybeSentinel.DEFAULT
    result[-1] = result[-1].with_changes(comma=last)
    return result


def _plain_star(star: object) -> object:
    """The bare ``*`` before keyword-only parameters goes; ``*args`` stays."""
    return cst.MaybeSentinel.DEFAULT if isinstance(star, cst.ParamStar) else star


def rewrite_constructors(program: Program) -> None:
    RewriteConstructors.apply(program)
