"""``forward_batch`` is handed from the model down to every attention layer.

Which modules reach attention is found from what their methods mention: an attention layer, or a class that reaches one.
Which attribute holds such a module is found from what is assigned to it. Methods that call one get the argument, and
so do all that call them. ``intermediate_tensors``, which passes between stages, gives it its place; ``inputs_embeds``
is called ``input_embeds`` here.
"""

from collections.abc import Iterator

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.names import names_in
from rtp_llm.port.program import (
    Program,
    base_names,
    code,
    computes_logits,
    family,
    lineage,
    methods,
    parameters,
    self_attribute,
)
from rtp_llm.port.rules.base import Rule, keyword, with_args
from rtp_llm.port.scopes import Scopes
from rtp_llm.port.source import Origin, bound_names
from rtp_llm.port.values import ATTENTION_CLASSES, Scope
from rtp_llm.port.visiting import Transformer, Visitor
from rtp_llm.port.vocabulary import RECURRENT

BATCH = "forward_batch"
STAGE = "intermediate_tensors"
NUM_INPUTS = 3  # of attention: queries, keys and values
ATTENTIONS = (
    "Attention", "EncoderOnlyAttention", "ChunkedLocalAttention", "PrefillPrefixLMAttention", "RadixAttention",
    "MLAAttention", "StaticSinkAttention", "MultiHeadLatentAttentionWrapper", *RECURRENT,
)  # fmt: skip
LATENT = "MultiHeadLatentAttentionWrapper"
Method = tuple[str, str]  # class ("" for a function), name


class Reach:
    """Which classes, attributes and methods reach attention.

    Attributes:
        classes: names of classes that reach it.
        needs: methods and functions that are given the batch.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.all = program.classes()
        self.functions = program.functions()
        self.scopes = Scopes(program)
        self._passed = _passed_classes(program)
        self._class_attributes = _class_attributes(self.all)
        self._made = _made_inside(self.all)
        self.classes = self._reaching()
        self.attributes = {name: self._reaching_attributes(name) for name in self.all}
        self.needs: set[Method] = set()
        self.most_positional = 0  # arguments given by position to a module that reaches attention
        self._calls: dict[int, tuple[list[cst.Call], set[str]]] = {}  # of functions: their calls, and loop_names
        self._find_needs()

    def _reaching(self) -> set[str]:
        mentions = {name: _mentions(node) for name, node in self.all.items()}
        for statement in self.program.module.body:  # tables of classes
            if isinstance(statement, cst.SimpleStatementLine):
                for name in bound_names(statement):
                    mentions[name] = names_in(statement)
        for name, function in self.functions.items():
            mentions[name] = _mentions(function)
        found = {name for name in self.program.engine_names if self.program.engine_name(cst.Name(name)) in ATTENTIONS}
        while True:
            new = {name for name, others in mentions.items() if others & found} - found
            new |= {name for name, node in self.all.items() if set(base_names(node)) & found} - found
            if not new:
                return found
            found |= new

    def _reaching_attributes(self, name: str) -> set[str]:
        node = next(iter(methods(self.all[name]).values()), None)
        relatives = [methods(self.all[other]) for other in family(name, self.all)]
        node = node or next((method for group in relatives for method in group.values()), None)
        if node is None:
            return set()
        assigned = self.scopes.at(node).attributes.assigned
        reaching = {
            attribute
            for attribute, values in assigned.items()
            if any(value is not None and self._reaches(value, scope) for value, scope in values)
        }
        return reaching | set(self._filled_lists(name))

    def _filled_lists(self, name: str) -> Iterator[str]:
        """Attributes of a class and its bases to which modules that reach attention are appended, or in which they are
        put under a key."""
        for method in (method for node in lineage(name, self.all) for method in methods(node).values()):
            scope = self.scopes.at(method)
            for call in m.findall(method.body, _FILLS):
                assert isinstance(call, cst.Call) and isinstance(call.func, cst.Attribute)
                if any(self._reaches(arg.value, scope) for arg in call.args):
                    yield self_attribute(call.func.value)
            for assign in m.findall(method.body, m.Assign()):
                assert isinstance(assign, cst.Assign)
                places = [each.target.value for each in assign.targets if isinstance(each.target, cst.Subscript)]
                if places and self._reaches(assign.value, scope):
                    yield from filter(None, map(self_attribute, places))

    def _reaches(self, value: cst.BaseExpression, scope: Scope, depth: int = 0) -> bool:
        names = names_in(value)
        names |= {other for name in names if scope.is_local(name) for other in self._made.get(name, ())}
        if names & self.classes:
            return True
        if depth > 3:
            return False
        for name in names:
            if self._passed.get(name, set()) & self.classes and scope.is_local(name):
                return True
            for assigned in scope.assigned.get(name, []):
                if assigned is not None and self._reaches(assigned, scope, depth + 1):
                    return True
        for call in m.findall(value, m.Call(func=m.Attribute(value=m.Name("self")))):
            assert isinstance(call, cst.Call)
            method = self_attribute(call.func)
            if self._class_attributes.get(method, set()) & self.classes:
                return True
            owners = [other for other in self.all.values() if method in methods(other)]
            if any(_mentions(methods(owner)[method]) & self.classes for owner in owners):
                return True
        return False

    def _find_needs(self) -> None:
        candidates = [
            (name, method, node)
            for name, cls in self.all.items()
            for method, node in methods(cls).items()
            if method != "__init__"
        ] + [("", name, node) for name, node in self.functions.items()]
        for name in self.all:  # the engine itself calls these with the batch
            if computes_logits(name, self.all) and "forward" in methods(self.all[name]):
                self.needs.add((name, "forward"))
                self._add_relatives(name, "forward")
        while True:
            before = len(self.needs)
            for owner, method, node in candidates:
                if (owner, method) not in self.needs and self._calls_attention(owner, node):
                    self.needs.add((owner, method))
                    self._add_relatives(owner, method)
            if len(self.needs) == before:
                break
        for owner, _, node in candidates:
            self._calls_attention(owner, node)  # of those that are given the batch whatever they call, too
            calls, loops = self._calls[id(node)]
            for call in calls:
                if self._is_module_call(call, owner, loops) and STAGE not in names_in(call):
                    self.most_positional = max(self.most_positional, sum(not arg.keyword for arg in call.args))

    def _is_module_call(self, call: cst.Call, owner: str, loops: set[str]) -> bool:
        """Whether a call is of a module whose class is only known by what it reaches."""
        is_named = isinstance(call.func, cst.Attribute) and not self_attribute(call.func)
        node = next(iter(methods(self.all[owner]).values()), None) if owner in self.all else None
        if node is not None:
            values = self.scopes.at(node).attributes.assigned.get(self_attribute(call.func), [])
            layers = [v for v, _ in values if isinstance(v, cst.Call) and self.program.is_engine(v.func, *ATTENTIONS)]
            is_named = is_named or (bool(values) and len(layers) == len(values))
        return not is_named and self.takes_batch(call, owner, loops)

    def _add_relatives(self, owner: str, method: str) -> None:
        """Methods of one name in a family are called in one way."""
        if owner:
            self.needs |= {(other, method) for other in family(owner, self.all) if method in methods(self.all[other])}

    def _calls_attention(self, owner: str, node: cst.FunctionDef) -> bool:
        if id(node) not in self._calls:
            calls = [call for call in m.findall(node.body, m.Call()) if isinstance(call, cst.Call)]
            self._calls[id(node)] = calls, self.loop_names(owner, node)
        calls, loops = self._calls[id(node)]
        return any(self.takes_batch(call, owner, loops) for call in calls)

    def loop_names(self, owner: str, node: cst.FunctionDef) -> set[str]:
        """Local names that hold a module which reaches attention: of a loop over such modules, or assigned."""
        attributes = self.attributes.get(owner, set())
        found: set[str] = set()
        for loop in m.findall(node.body, m.For() | m.CompFor()):
            assert isinstance(loop, cst.For | cst.CompFor)
            if _mentioned_attributes(loop.iter) & attributes or _deeper_layers(loop.iter):
                found |= names_in(loop.target) - _counters(loop)
        for assign in m.findall(node.body, m.Assign()):
            assert isinstance(assign, cst.Assign)
            base = assign.value.value if isinstance(assign.value, cst.Subscript) else assign.value
            target = assign.targets[0].target
            if self_attribute(base) in attributes and isinstance(target, cst.Name):
                found.add(target.value)
        return found

    def takes_batch(self, call: cst.Call, owner: str, loops: set[str]) -> bool:
        """Whether a call must be given the batch."""
        func = call.func
        if any(isinstance(arg.value, cst.Name) and arg.value.value == STAGE for arg in call.args):
            return True  # what passes between stages is only given to models
        attributes = self.attributes.get(owner, set())
        if isinstance(func, cst.Name):
            return func.value in loops or ("", func.value) in self.needs
        if isinstance(func, cst.Subscript):
            return self_attribute(func.value) in attributes
        if not isinstance(func, cst.Attribute):
            return False
        name = func.attr.value
        own = self_attribute(func)
        if own:
            if any((node.name.value, own) in self.needs for node in lineage(owner, self.all)):
                return True
            return own in attributes and not any(own in methods(node) for node in lineage(owner, self.all))
        if code(func.value) == "super()":
            bases = lineage(owner, self.all)[1:]
            return any((node.name.value, name) in self.needs for node in bases)
        holder = func.value.value if isinstance(func.value, cst.Subscript) else func.value
        is_module = self_attribute(holder) in attributes or (isinstance(holder, cst.Name) and holder.value in loops)
        return is_module and any(method == name and cls in self.classes for cls, method in self.needs)


def _class_attributes(classes: dict[str, cst.ClassDef]) -> dict[str, set[str]]:
    """Attributes of classes, such as ``layer_cls = …`` -> names that their values mention."""
    found: dict[str, set[str]] = {}
    for node in classes.values():
        for statement in node.body.body:
            if isinstance(statement, cst.SimpleStatementLine):
                for name in bound_names(statement):
                    found.setdefault(name, set()).update(names_in(statement))
    return found


_FILLS = m.Call(func=m.Attribute(value=m.Attribute(value=m.Name("self")), attr=m.Name("append")))
_APPENDS = m.Call(func=m.Attribute(value=m.Name(), attr=m.Name("append")))


def _made_inside(classes: dict[str, cst.ClassDef]) -> dict[str, set[str]]:
    """Local names of methods whose assignments do not tell what they hold -> names that tell it: functions, such as
    ``def get_layer(prefix)``, with what they mention, and lists with what is appended to them."""
    found: dict[str, set[str]] = {}
    for method in (method for node in classes.values() for method in methods(node).values()):
        for node in m.findall(method.body, m.FunctionDef() | _APPENDS):
            if isinstance(node, cst.FunctionDef):
                found.setdefault(node.name.value, set()).update(_mentions(node))
            elif isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute):
                name = cst.ensure_type(node.func.value, cst.Name).value
                found.setdefault(name, set()).update(*(_mentions(arg.value) for arg in node.args))
    return found


def _mentions(node: cst.CSTNode) -> set[str]:
    """Names in a definition, without annotations of types and questions by ``isinstance``."""
    finder = _Mentions()
    node.visit(finder)
    return finder.names


class _Mentions(Visitor):
    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_Annotation(self, node: cst.Annotation) -> bool:
        return False

    def visit_Call(self, node: cst.Call) -> bool:
        return not (isinstance(node.func, cst.Name) and node.func.value == "isinstance")

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        node.value.visit(self)
        return False

    def visit_Name(self, node: cst.Name) -> None:
        self.names.add(node.value)


def _passed_classes(program: Program) -> dict[str, set[str]]:
    """Parameter names -> names of classes that calls give them, or that are their defaults or their types."""
    passed: dict[str, set[str]] = {}
    known = set(program.classes()) | set(program.engine_names)
    for arg in m.findall(program.module, m.Arg(keyword=m.Name())):
        assert isinstance(arg, cst.Arg) and arg.keyword is not None
        passed.setdefault(arg.keyword.value, set()).update(names_in(arg.value) & known)
    for param in m.findall(program.module, m.Param()):
        assert isinstance(param, cst.Param)
        for told in (param.default, param.annotation):
            if told is not None:
                passed.setdefault(param.name.value, set()).update(names_in(told) & known)
    return passed


def _mentioned_attributes(node: cst.CSTNode) -> set[str]:
    return {
        attribute.attr.value
        for attribute in m.findall(node, m.Attribute(value=m.Name("self")))
        if isinstance(attribute, cst.Attribute)
    }


def _deeper_layers(node: cst.CSTNode) -> bool:
    """A loop over ``self.model.layers`` counts when its variable is called; it is not known whether it reaches."""
    return bool(m.findall(node, m.Attribute(value=m.Attribute(value=m.Name("self")), attr=m.Name("layers"))))


def _counters(loop: cst.For | cst.CompFor) -> set[str]:
    """The index of ``for idx, layer in enumerate(…)``."""
    if isinstance(loop.target, cst.Tuple) and m.matches(loop.iter, m.Call(func=m.Name("enumerate"))):
        return names_in(loop.target.elements[0].value)
    return set()


class ThreadBatch(Rule):
    def __init__(self, program: Program, reach: Reach) -> None:
        super().__init__(program)
        self.reach = reach
        self._loops: list[set[str]] = []

    @property
    def owner(self) -> str:
        return self.class_stack[-1] if self.class_stack else ""

    def _needs(self, node: cst.FunctionDef) -> bool:
        return len(self.function_stack) == 1 and (self.owner, node.name.value) in self.reach.needs

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool | None:
        outer = self._loops[-1] if self._loops else set()
        self._loops.append(outer | self.reach.loop_names(self.owner, node))
        return super().visit_FunctionDef(node)

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        self._loops.pop()
        if self._needs(original_node):
            self.count("forward_batch threaded")
            updated_node = updated_node.with_changes(params=self._with_batch(updated_node.params))
        elif any(param.name.value == STAGE for param in parameters(original_node)):
            kept = [param for param in updated_node.params.params if param.name.value != STAGE]
            updated_node = updated_node.with_changes(params=updated_node.params.with_changes(params=kept))
        return super().leave_FunctionDef(original_node, updated_node)

    def _with_batch(self, params: cst.Parameters) -> cst.Parameters:
        self.program.imports.setdefault("ForwardBatch", Origin("rtp_llm.srt.forward_batch", "ForwardBatch"))
        new = cst.Param(cst.Name(BATCH), annotation=cst.Annotation(cst.Name("ForwardBatch")))
        names = [param.name.value for param in params.params]
        if BATCH in names:
            return params
        if STAGE in names:
            place = names.index(STAGE)
            new = new.with_changes(comma=params.params[place].comma)
            no_default = {"default": None, "equal": cst.MaybeSentinel.DEFAULT}
            before = [param.with_changes(**no_default) for param in params.params[:place]]
            return params.with_changes(params=[*before, new, *params.params[place + 1 :]])
        place = next((i for i, param in enumerate(params.params) if param.default is not None), len(names))
        is_called_by_engine = self.function == "forward" and computes_logits(self.owner, self.reach.all)
        is_skipped = self.reach.most_positional >= place and not is_called_by_engine
        if place < len(names) and is_skipped and params.star_arg == cst.MaybeSentinel.DEFAULT:
            # Some call passes one of the parameters after this place by position: then the batch has a name only.
            return self._by_name(params, new)
        commas = [param.comma for param in params.params if isinstance(param.comma, cst.Comma)]
        usual = commas[1] if len(commas) > 1 else cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        result = list(params.params)
        if place == len(names):
            last = result[-1]
            result[-1] = last.with_changes(comma=usual, whitespace_after_param=cst.SimpleWhitespace(""))
            result.append(new.with_changes(comma=last.comma, whitespace_after_param=last.whitespace_after_param))
        else:
            result.insert(place, new.with_changes(comma=usual))
        return params.with_changes(params=result)

    def _by_name(self, params: cst.Parameters, new: cst.Param) -> cst.Parameters:
        """Add the batch after a star, in the layout of the parameters before it."""
        last = params.params[-1]
        commas = [param.comma for param in params.params if isinstance(param.comma, cst.Comma)]
        usual = commas[1] if len(commas) > 1 else cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        before = last.with_changes(comma=usual, whitespace_after_param=cst.SimpleWhitespace(""))
        if not params.kwonly_params:
            new = new.with_changes(comma=last.comma, whitespace_after_param=last.whitespace_after_param)
        return params.with_changes(
            params=[*params.params[:-1], before],
            star_arg=cst.ParamStar(comma=usual),
            kwonly_params=[new, *params.kwonly_params],
        )

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:
        loops = self._loops[-1] if self._loops else set()
        if not self.function_stack or self.function_stack[0].name.value == "__init__":
            return updated_node
        if not self.reach.takes_batch(original_node, self.owner, loops):
            return updated_node
        args = list(updated_node.args)
        is_attention = self._is_layer(original_node, *ATTENTION_CLASSES, "RadixAttention")
        if is_attention:
            args = [arg for place, arg in enumerate(args) if _is_input(place, arg)]
        for position, arg in enumerate(args):
            named = arg.keyword is not None and arg.keyword.value == STAGE
            if named or (isinstance(arg.value, cst.Name) and arg.value.value == STAGE):
                new = keyword(BATCH, BATCH) if arg.keyword else cst.Arg(cst.Name(BATCH))
                args[position] = new.with_changes(comma=arg.comma, whitespace_after_arg=arg.whitespace_after_arg)
                return updated_node.with_changes(args=args)
        if self._is_layer(original_node, LATENT) and sum(not arg.keyword for arg in args) > 2:
            new = cst.Arg(cst.Name(BATCH))
            return with_args(updated_node, [*args[:2], new, *args[2:]])
        stars = [arg for arg in args if arg.star]
        plain = [arg for arg in args if not arg.star]
        is_plain = is_attention and len(args) == NUM_INPUTS and not stars and not any(arg.keyword for arg in args)
        new = cst.Arg(cst.Name(BATCH)) if is_plain else keyword(BATCH, BATCH)
        return with_args(updated_node, [*plain, new, *stars])

    def _is_layer(self, call: cst.Call, *names: str) -> bool:
        """Whether the callee is a layer of these names."""
        values = self.scope.attributes.assigned.get(self_attribute(call.func), [])
        layers = [
            value for value, _ in values if isinstance(value, cst.Call) and self.program.is_engine(value.func, *names)
        ]
        return bool(values) and len(layers) == len(values)


def _is_input(place: int, arg: cst.Arg) -> bool:
    """Whether an argument of attention is one of queries, keys and values; the others say where the output lies."""
    return arg.keyword.value not in ("output_shape", "output_dtype") if arg.keyword else place < NUM_INPUTS


class RenameEmbeds(Transformer):
    """``inputs_embeds`` is ``input_embeds`` here."""

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.Name:
        return (
            updated_node.with_changes(value="input_embeds") if updated_node.value == "inputs_embeds" else updated_node
        )


def thread_batch(program: Program) -> None:
    module = program.module.visit(ThreadBatch(program, Reach(program)))
    program.module = module.visit(RenameEmbeds())
