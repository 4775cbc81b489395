"""Logits are computed at the end of ``forward``, for the tokens that need them.

``compute_logits`` goes, and ``forward`` returns
``self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)``.
``LogitsProcessor(config.vocab_size, scale=…)`` becomes ``LogitsProcessor(config, logit_scale=…)``, and
``embed_input_ids`` of the outermost class becomes ``get_input_embeddings``, which gives the module.
"""

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.names import names_in
from rtp_llm.port.program import COMPUTE, Program, code, computes_logits, family, methods, parameters, self_attribute
from rtp_llm.port.rules.base import Rule, expression
from rtp_llm.port.rules.calls import NamedCall
from rtp_llm.port.rules.threading import BATCH
from rtp_llm.port.scopes import Scopes
from rtp_llm.port.source import Origin
from rtp_llm.port.visiting import Transformer


class RewriteProcessors(Rule):
    """``LogitsProcessor(vocab_size, …)`` reads the vocabulary from the configuration here."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if not self.program.is_engine(original_node.func, "LogitsProcessor"):
            return updated_node
        call = NamedCall.of(updated_node, "LogitsProcessor")
        if call is None:
            return updated_node
        sizes = [call.value("org_vocab_size"), call.value("vocab_size")]
        holders = [
            code(size.value) for size in sizes if isinstance(size, cst.Attribute) and size.attr.value == "vocab_size"
        ]
        config = next((holder for holder in holders if holder != "self"), self._config())
        values = {"config": cst.Arg(expression(config))}
        call.drop("vocab_size", "org_vocab_size", "logits_as_input")
        call.values = {**values, **call.values}
        call.rename("scale", "logit_scale")
        scale = call.value("logit_scale")
        if scale is not None and code(scale) in ("1.0", "1"):
            call.drop("logit_scale")
        self.count("LogitsProcessor given the configuration")
        return call.written(1)

    def _config(self) -> str:
        names = {param.name.value for param in parameters(self.function_stack[-1])} if self.function_stack else set()
        return "config" if "config" in names or self.scope.is_local("config") else "self.config"


class RewriteLogits(Rule):
    """Moves the computation of logits to the end of ``forward``."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        classes = program.classes()
        self.tops = {name for name, node in classes.items() if computes_logits(name, classes)}
        self.inlined: dict[str, cst.Call] = {}
        for name in self.tops:
            owners = [other for other in family(name, classes) if COMPUTE in methods(classes[other])]
            calls = [_plain_call(methods(classes[owner])[COMPUTE]) for owner in owners]
            call = calls[0] if calls else None
            if call is not None and all(other is not None and code(other) == code(call) for other in calls):
                self.inlined[name] = call

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        owner, name = self.class_stack[-1] if self.class_stack else "", original_node.name.value
        is_method = len(self.function_stack) == 1 and owner in self.tops
        if is_method and name == COMPUTE:
            if owner in self.inlined:
                super().leave_FunctionDef(original_node, updated_node)
                return cst.RemoveFromParent()
            updated_node = self._with_batch(updated_node)
        elif is_method and name == "forward" and not m.findall(original_node, _super_forward()):
            updated_node = self._with_logits(owner, updated_node)
        return super().leave_FunctionDef(original_node, updated_node)

    def _with_batch(self, method: cst.FunctionDef) -> cst.FunctionDef:
        """``compute_logits(self, input_ids, hidden_states, forward_batch)``, where the body does more than one call."""
        hidden = method.params.params[1].name.value
        rewriter = _ProcessorCalls()
        new = method.with_changes(
            params=cst.Parameters([cst.Param(cst.Name(name)) for name in ("self", "input_ids", hidden, BATCH)]),
            returns=self._returns(),
        )
        result = cst.ensure_type(new.visit(rewriter), cst.FunctionDef)
        if not rewriter.found or _changes_logits(result):
            self.review(
                "the logits are changed after they were computed, or computed in another way: say it to "
                "LogitsProcessor (logit_scale, soft_cap), which gives an output of several fields"
            )
        return result

    def _with_logits(self, owner: str, method: cst.FunctionDef) -> cst.FunctionDef:
        names = [param.name.value for param in parameters(method)]
        ids = names[1] if len(names) > 1 else "input_ids"
        self.count("logits computed at the end of forward")
        call = self.inlined.get(owner)

        def computed(hidden: cst.BaseExpression) -> cst.BaseExpression:
            if call is None:
                return expression(f"self.{COMPUTE}({ids}, {code(hidden)}, {BATCH})")
            head = code(call.args[0].value)
            return expression(f"{code(call.func)}({ids}, {code(hidden)}, {head}, {BATCH})")

        result = cst.ensure_type(method.visit(_Returns(computed)), cst.FunctionDef)
        return result.with_changes(returns=self._returns())

    def _returns(self) -> cst.Annotation:
        self.program.imports.setdefault(
            "LogitsProcessorOutput", Origin("rtp_llm.srt.layers.logits_processor", "LogitsProcessorOutput")
        )
        return cst.Annotation(cst.Name("LogitsProcessorOutput"))


def _super_forward() -> m.Call:
    return m.Call(func=m.Attribute(value=m.Call(func=m.Name("super")), attr=m.Name("forward")))


def _plain_call(method: cst.FunctionDef) -> cst.Call | None:
    """Return ``self.logits_processor(head, hidden_states)`` if that is all that the method does."""
    statements = [code(line) for line in method.body.body if not _is_docstring(line)]
    calls = m.findall(method.body, m.Call(func=m.Attribute(value=m.Name("self"))))
    if (
        len(calls) != 1
        or not isinstance(calls[0], cst.Call)
        or len(calls[0].args) != 2
        or len(method.params.params) < 2
    ):
        return None
    call = calls[0]
    hidden = method.params.params[1].name.value
    if call.args[1].value is None or code(call.args[1].value) != hidden:
        return None
    text = code(call)
    plain = (
        len(statements) == 1 and statements[0] == f"return {text}",
        len(statements) == 2 and statements[0] == f"logits = {text}" and statements[1] == "return logits",
    )
    return call if any(plain) else None


def _is_docstring(node: cst.CSTNode) -> bool:
    return m.matches(node, m.SimpleStatementLine(body=[m.Expr(value=m.SimpleString())]))


def _changes_logits(method: cst.FunctionDef) -> bool:
    """Whether anything but a return follows the processor's call."""
    lines = [line for line in method.body.body if not _is_docstring(line)]
    positions = [i for i, line in enumerate(lines) if BATCH in names_in(line)]
    after = lines[positions[-1] + 1 :] if positions else []
    if any(not m.matches(line, m.SimpleStatementLine(body=[m.Return(value=m.Name())])) for line in after):
        return True
    last = lines[positions[-1]] if positions else None
    call = m.Call(func=m.Attribute(value=m.Name("self"), attr=m.Name("logits_processor")))
    plain = m.SimpleStatementLine(body=[m.Return(value=call) | m.Assign(value=call)])
    return last is not None and not m.matches(last, plain)


class _ProcessorCalls(Transformer):
    """``self.logits_processor(head, hidden)`` with our arguments; factors on the logits become ones on the states."""

    def __init__(self) -> None:
        self.found = False

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if self_attribute(updated_node.func) != "logits_processor" or len(updated_node.args) < 2:
            return updated_node
        self.found = True
        head, hidden = (code(arg.value) for arg in updated_node.args[:2])
        return expression(f"self.logits_processor(input_ids, {hidden}, {head}, {BATCH})")


class _Returns(Transformer):
    def __init__(self, computed) -> None:  # type: ignore[no-untyped-def]
        self.computed = computed

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        return node.name.value == "forward"

    def visit_Lambda(self, node: cst.Lambda) -> bool:
        return False

    def leave_Return(self, original_node: cst.Return, updated_node: cst.Return) -> cst.Return:
        return (
            updated_node
            if updated_node.value is None
            else updated_node.with_changes(value=self.computed(updated_node.value))
        )


class ProvideEmbeddings(Rule):
    """The entry's ``embed_input_ids`` becomes ``get_input_embeddings``."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.all = Scopes(program)
        self.entries = {name for _, name in program.entries}
        classes = program.classes()
        self.paths = {name: self._path(name, classes, 3) for name in self.entries}

    def _path(self, name: str, classes: dict[str, cst.ClassDef], depth: int) -> str:
        """Return the attributes that lead from an instance to its token embedding; "" if none is found."""
        node = next((method for cls in _with_bases(name, classes) for method in methods(cls).values()), None)
        if node is None or depth == 0:
            return ""
        assigned = self.all.at(node).attributes.assigned
        deeper = []
        for attribute, values in assigned.items():
            names = {other for value, _ in values if value is not None for other in _constructed(value, self.program)}
            if any(self.program.engine_name(cst.Name(other)) == "VocabParallelEmbedding" for other in names):
                return attribute
            deeper += [(attribute, other) for other in names if other in classes]
        for attribute, other in deeper:
            inner = self._path(other, classes, depth - 1)
            if inner:
                return f"{attribute}.{inner}"
        return ""

    def _is_embedding(self, method: cst.FunctionDef) -> bool:
        """vLLM's ``embed_input_ids``; SGLang's ``get_input_embeddings`` if it is given ids."""
        name, is_given_ids = method.name.value, len(method.params.params) > 1
        return name == "embed_input_ids" or (name == "get_input_embeddings" and is_given_ids)

    def leave_ClassDef(self, original_node: cst.ClassDef, updated_node: cst.ClassDef) -> cst.BaseStatement:
        name = original_node.name.value
        path = self.paths.get(name, "")
        if name in self.entries and isinstance(updated_node.body, cst.IndentedBlock):
            kept = []
            for statement in updated_node.body.body:
                if isinstance(statement, cst.FunctionDef) and self._is_embedding(statement) and path:
                    statement = statement.with_changes(**_getter(statement, path))
                    self.count("embed_input_ids made get_input_embeddings")
                kept.append(statement)
            updated_node = updated_node.with_changes(body=updated_node.body.with_changes(body=kept))
        return super().leave_ClassDef(original_node, updated_node)


def _with_bases(name: str, classes: dict[str, cst.ClassDef]) -> list[cst.ClassDef]:
    return [classes[other] for other in [name, *sorted(family(name, classes) - {name})] if other in classes]


def _constructed(value: cst.BaseExpression, program: Program) -> set[str]:
    """Classes that an expression constructs, through a method of the module too."""
    found = {call.func.value for call in m.findall(value, m.Call(func=m.Name())) if isinstance(call, cst.Call)}  # type: ignore[attr-defined]
    classes = program.classes()
    for call in m.findall(value, m.Call(func=m.Attribute(value=m.Name("self")))):
        assert isinstance(call, cst.Call)
        for node in classes.values():
            method = methods(node).get(self_attribute(call.func))
            if method is not None:
                found |= {
                    inner.func.value  # type: ignore[attr-defined]
                    for inner in m.findall(method, m.Call(func=m.Name()))
                    if isinstance(inner, cst.Call)
                }
    return found


def _getter(old: cst.FunctionDef, path: str) -> dict[str, object]:
    new = cst.parse_statement(f"def get_input_embeddings(self) -> nn.Module:\n    return self.{path}\n")
    new = cst.ensure_type(new, cst.FunctionDef)
    return {"name": new.name, "params": new.params, "returns": new.returns, "body": new.body}


def rewrite_logits(program: Program) -> None:
    RewriteProcessors.apply(program)
    RewriteLogits.apply(program)
    ProvideEmbeddings.apply(program)
