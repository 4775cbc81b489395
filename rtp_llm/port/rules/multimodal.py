"""Models that take media: ``get_image_feature`` and ``get_video_feature`` in front of ``embed_multimodal``, and a
processor to begin with.

What the other engine's processor says of the prompt and of the encoder's inputs is read before that processor goes: the
placeholder that ``get_placeholder_str`` returns, and the fields that ``_get_mm_fields_config`` lists. The checkpoint's
own processor of transformers prepares the media here.
"""

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.program import Program, code, lineage, methods, self_attribute
from rtp_llm.port.rules.base import CONTINUED, MARK, Rule
from rtp_llm.port.rules.fold import opened, tidied
from rtp_llm.port.source import Origin, Statement
from rtp_llm.port.visiting import Transformer

EMBED = "embed_multimodal"
_CONTEXTS = frozenset({"_mark_tower_model", "_mark_language_model", "_mark_composite_model"})
_VOID = frozenset({"configure_mm_token_handling"})
_METHODS = frozenset({
    "get_placeholder_str", "get_mm_lora_token_counts", "get_language_model_spec", "recompute_mrope_positions",
})  # fmt: skip
_FIELD = "MultiModalFieldConfig"
_MODALITIES = ("video", "audio", "image")
_MULTIMODAL = "rtp_llm.srt.multimodal"
_IMPORTS = {
    "BaseMultimodalProcessor": f"{_MULTIMODAL}.base_processor",
    "MultimodalSpecialTokens": f"{_MULTIMODAL}.base_processor",
    "MultimodalDataItem": f"{_MULTIMODAL}.items",
    "feature_specs": f"{_MULTIMODAL}.feature_specs",
    "general_mm_embed_routine": "rtp_llm.srt.layers.multimodal",
    "pad_placeholders": f"{_MULTIMODAL}.items",
    "LogitsProcessorOutput": "rtp_llm.srt.layers.logits_processor",
    "ForwardBatch": "rtp_llm.srt.forward_batch",
}
MROPE = "get_mrope_input_positions"
REGISTERED = "init_vllm_registered_model"
FORWARD = """
def forward(
    self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
) -> LogitsProcessorOutput:
{axes}    hidden_states = general_mm_embed_routine(
        input_ids, forward_batch, {path}.model, multimodal_model=self, positions=positions
    )
    return {path}.logits_processor(input_ids, hidden_states, {path}.lm_head, forward_batch)

def get_input_embeddings(self) -> nn.Module:
    return {path}.model.get_input_embeddings()

pad_input_ids = pad_placeholders
"""
FEATURE = f'''
def get_{{modality}}_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
    """[rows of all items, hidden size], in the order of the items."""
    {MARK}see that the checkpoint's processor gives these inputs, in the shapes that {EMBED} expects
    inputs: dict[str, object] = {{"{{feature}}": torch.cat([item.feature for item in items])}}
    for name in {{others}}:
        inputs[name] = torch.cat([torch.as_tensor(getattr(item, name)) for item in items])
    rows = self.{EMBED}(**inputs)
    parts = [rows] if isinstance(rows, torch.Tensor) else rows
    return torch.cat([part.flatten(0, -2) for part in parts])
'''
PROCESSOR = f"""
class {{name}}Processor(BaseMultimodalProcessor):
    models = [{{name}}]

    def __init__(self, hf_config, server_args, _processor, *args, **kwargs):
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        {MARK}the other engine's placeholders are {{placeholders}}: see that the prompt has one of these per item
        self.mm_tokens = MultimodalSpecialTokens({{tokens}}).build(_processor)

    {MARK}the checkpoint's processor of transformers expands placeholders; where it does not, define replacement(item)
    async def process_mm_data_async(self, image_data, audio_data, input_text, request_obj, **kwargs):
        {{process}}
"""
PROCESS = "return await self.process(image_data, audio_data, input_text, request_obj)"
PROCESS_POSITIONS = """output = await self.process(image_data, audio_data, input_text, request_obj)
        features = feature_specs(output.mm_items)
        output.mrope_positions, output.mrope_position_delta = self.{method}(output.input_ids, features)
        return output"""
MARK_POSITIONS = f"""{MARK}positions have three axes: set mrope_positions [3, tokens] and mrope_position_delta
        {CONTINUED}of the result before it is returned, as {{method}} of the other engine's file computes them
        """
THREE_AXES = """    if forward_batch.mrope_positions is not None:
        positions = forward_batch.mrope_positions
"""


class TakeMedia(Rule):
    """Contexts and bookkeeping of the other engine go; ``get_image_feature`` is written before ``embed_multimodal``."""

    def __init__(self, program: Program, fields: dict[str, list[str]]) -> None:
        super().__init__(program)
        self.fields = fields
        found = {name: _language_model(node, program) for name, node in program.classes().items()}
        self.paths = {name: path for name, path in found.items() if path}  # class -> its language model

    def _forward(self) -> cst.FlattenSentinel[cst.BaseStatement]:
        self.count("forward made the routine that puts media in their places")
        _need_imports(
            self.program, "general_mm_embed_routine", "pad_placeholders", "LogitsProcessorOutput", "ForwardBatch"
        )
        text = FORWARD.replace("{path}", self.paths[self.class_stack[-1]])
        body = cst.parse_module(text.replace("{axes}", THREE_AXES if self.program.has_mrope else "")).body
        return cst.FlattenSentinel([body[0], *(_spaced(statement) for statement in body[1:])])

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        """A language model that the other engine's registry makes is made by ours."""
        if not self.program.is_engine(original_node.func, REGISTERED):
            return updated_node
        given = {arg.keyword.value: code(arg.value) for arg in updated_node.args if arg.keyword}
        config = given.get("hf_config", "config.get_text_config()")
        names = f", architectures={given['architectures']}" if "architectures" in given else ""
        self.count("language models made by our registry")
        self.program.engine_names.setdefault("make_registered_model", Origin("vllm", "make_registered_model"))
        prefix = given.get("prefix", "prefix")
        return cst.parse_expression(f"make_registered_model({config}, quant_config, {prefix}{names})")

    def leave_With(self, original_node: cst.With, updated_node: cst.With):  # type: ignore[no-untyped-def]
        calls = [item.item for item in original_node.items]
        if not all(isinstance(call, cst.Call) and _method(call) in _CONTEXTS for call in calls):
            return updated_node
        self.count("contexts of the other engine removed")
        return opened(updated_node.body, updated_node.leading_lines)

    def leave_SimpleStatementLine(  # type: ignore[no-untyped-def]
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ):
        noted = super().leave_SimpleStatementLine(original_node, updated_node)
        small = original_node.body[0]
        is_void = isinstance(small, cst.Expr) and isinstance(small.value, cst.Call) and _method(small.value) in _VOID
        return cst.RemoveFromParent() if is_void else noted

    def leave_FunctionDef(  # type: ignore[no-untyped-def, override]
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ):
        noted = super().leave_FunctionDef(original_node, updated_node)
        name = original_node.name.value
        if not self.class_stack or self.function_stack:
            return noted
        if name in _METHODS or (name == "compute_logits" and self.class_stack[-1] in self.paths):
            return cst.RemoveFromParent()
        if name == "forward" and self.class_stack[-1] in self.paths:
            return self._forward()
        if name != EMBED:
            return noted
        _need_imports(self.program, "MultimodalDataItem")
        self.program.imports.setdefault("torch", Origin("torch"))
        texts = [self._feature(modality, self.fields.get(modality, [])) for modality in ("image", "video")]
        return cst.FlattenSentinel([noted, *(_parsed(text) for text in texts if text)])  # type: ignore[list-item]

    def _feature(self, modality: str, fields: list[str]) -> str:
        """Return the method that the engine calls for items of a kind; "" where the encoder does not take that kind."""
        feature = next((field for field in fields if "pixel" in field), "pixel_values" if modality == "image" else "")
        if not feature:
            return ""
        self.count(f"get_{modality}_feature written")
        others = tuple(field for field in fields if field != feature and "embeds" not in field)
        text = FEATURE.replace("{feature}", feature).replace("{others}", repr(others))
        return text.replace("{modality}", modality)

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        return tidied(updated_node)


def _language_model(node: cst.ClassDef, program: Program) -> str:
    """Return ``self.x`` of a class that encodes media for a language model of the registry; "" for others."""
    if EMBED not in methods(node):
        return ""
    for assign in m.findall(node, m.Assign(value=m.Call(func=m.Name()))):
        if isinstance(assign, cst.Assign) and isinstance(assign.value, cst.Call):
            target = assign.targets[0].target
            if program.is_engine(assign.value.func, REGISTERED) and self_attribute(target):
                return code(target)
    return ""


def _method(call: cst.Call) -> str:
    """Return the name in ``self.name(…)``; "" for other calls."""
    func = call.func
    is_own = isinstance(func, cst.Attribute) and code(func.value) == "self"
    return func.attr.value if is_own and isinstance(func, cst.Attribute) else ""


def _parsed(text: str) -> Statement:
    return _spaced(cst.parse_module(text).body[0])


def _spaced(statement: Statement) -> Statement:
    return statement.with_changes(leading_lines=[cst.EmptyLine(indent=False)])


def _need_imports(program: Program, *names: str) -> None:
    for name in names:
        program.imports.setdefault(name, Origin(_IMPORTS[name], name))


def _placeholders(program: Program) -> list[str]:
    """Texts that ``get_placeholder_str`` of any class returns."""
    functions = [methods(node)["get_placeholder_str"] for node in program.classes().values() if _has(node)]
    found = [
        str(part.value.evaluated_value)
        for function in functions
        for part in m.findall(function, m.Return(value=m.SimpleString()))
        if isinstance(part, cst.Return) and isinstance(part.value, cst.SimpleString)
    ]
    return list(dict.fromkeys(found))


def _has(node: cst.ClassDef) -> bool:
    return "get_placeholder_str" in methods(node)


def _fields(program: Program) -> dict[str, list[str]]:
    """Kinds of media -> names of the encoder's inputs for them, as the other engine's processors list them."""
    pairs: list[tuple[str, cst.BaseExpression]] = []
    for call in m.findall(program.module, m.Call(func=m.Name("dict"))):
        assert isinstance(call, cst.Call)
        pairs += [(arg.keyword.value, arg.value) for arg in call.args if arg.keyword]
    for element in m.findall(program.module, m.DictElement(key=m.SimpleString())):
        assert isinstance(element, cst.DictElement) and isinstance(element.key, cst.SimpleString)
        pairs.append((str(element.key.evaluated_value), element.value))
    pairs = [(name, value) for name, value in pairs if m.findall(value, m.Name(_FIELD))]
    found: dict[str, list[str]] = {}
    for name, value in dict(pairs).items():
        found.setdefault(_modality(name, value), []).append(name)
    return found


def _modality(name: str, value: cst.BaseExpression) -> str:
    """Return the kind of media of an input: the text that its description names, or as its name says."""
    texts = [text for text in m.findall(value, m.SimpleString()) if isinstance(text, cst.SimpleString)]
    named = next((str(text.evaluated_value) for text in texts if text.evaluated_value in _MODALITIES), None)
    return named or next((kind for kind in _MODALITIES if kind in name), "image")


def _token_lines(kind: str, token: str | None) -> list[str]:
    """Arguments of MultimodalSpecialTokens: the placeholder, and the id that transformers' configurations have."""
    by_id = f'{kind}_token_id=getattr(hf_config, "{kind}_token_id", None)'
    return [by_id] if token is None else [f"{kind}_token={token!r}", by_id]


def _placeholder(program: Program, kind: str) -> str | None:
    return next((text for text in program.placeholders if kind in text.lower()), None)


def take_media(program: Program) -> None:
    """Write what the engine calls; first of all rules, since it reads what the others remove."""
    if not any(EMBED in methods(node) for node in program.classes().values()):
        return
    program.placeholders = _placeholders(program)
    program.has_mrope = any(MROPE in methods(node) for node in program.classes().values())
    program.module = program.module.visit(TakeMedia(program, _fields(program)))


def add_processor(program: Program) -> None:
    """Write a processor for each model that takes media; last of the rules that remove what nothing uses."""
    classes = program.classes()
    for name in dict.fromkeys(name for _, name in program.entries):
        if name not in classes or "get_image_feature" not in methods(classes[name]):
            continue
        _need_imports(program, "BaseMultimodalProcessor", "MultimodalSpecialTokens")
        tokens = {kind: _placeholder(program, kind) for kind in ("image", "video")}
        if "get_video_feature" not in methods(classes[name]):
            del tokens["video"]
        text = PROCESSOR.replace("{name}", name)
        lines = [line for kind, token in tokens.items() for line in _token_lines(kind, token)]
        text = text.replace("{tokens}", "\n            " + ",\n            ".join(lines) + ",\n        ")
        text = text.replace("{placeholders}", ", ".join(map(repr, program.placeholders)) or "not given as texts")
        moved = _positions(name, program)
        if moved:
            program.done["positions of three axes computed by the processor"] += 1
            _need_imports(program, "feature_specs")
            text = text.replace("{process}", PROCESS_POSITIONS)
        elif program.has_mrope:
            text = text.replace("{process}", MARK_POSITIONS + PROCESS)
        text = text.replace("{process}", PROCESS).replace("{method}", MROPE)
        processor = cst.ensure_type(_parsed(text), cst.ClassDef)
        if moved:
            _take_methods(program, set(moved))
            processor = _with_methods(processor, list(moved.values()))
        program.done["processors begun"] += 1
        program.module = program.module.with_changes(body=[*program.module.body, processor])


def _positions(name: str, program: Program) -> dict[str, cst.FunctionDef]:
    """Return the method of a model that computes positions of three axes, and those that it calls, by their names;
    nothing where it needs more of the model than its configuration."""
    own: dict[str, cst.FunctionDef] = {}
    for node in reversed(lineage(name, program.classes())):
        own |= methods(node)
    found: dict[str, cst.FunctionDef] = {}
    waiting = [MROPE]
    while waiting:
        method = waiting.pop()
        if method in own and method not in found:
            found[method] = own[method]
            waiting += _own_attributes(own[method])
    needed = {attribute for node in found.values() for attribute in _own_attributes(node)}
    return found if needed <= {"config", *found} else {}


def _own_attributes(node: cst.CSTNode) -> list[str]:
    return [self_attribute(found) for found in m.findall(node, m.Attribute()) if self_attribute(found)]  # type: ignore[arg-type]


def _take_methods(program: Program, names: set[str]) -> None:
    """Remove methods of these names from the program's classes, unless another method calls them."""
    for node in program.classes().values():
        for name, method in methods(node).items():
            if name not in names:
                names = names - set(_own_attributes(method))
    program.module = cst.ensure_type(program.module.visit(_RemoveMethods(names)), cst.Module)


class _RemoveMethods(Transformer):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.RemovalSentinel:
        return cst.RemoveFromParent() if original_node.name.value in self.names else updated_node


def _with_methods(node: cst.ClassDef, added: list[cst.FunctionDef]) -> cst.ClassDef:
    """Give the processor methods of the model, which read ``self.config``."""
    body = list(node.body.body)
    init = next(i for i, statement in enumerate(body) if isinstance(statement, cst.FunctionDef))
    constructor = cst.ensure_type(body[init], cst.FunctionDef)
    lines = [*constructor.body.body, cst.parse_statement("self.config = hf_config")]
    body[init] = constructor.with_changes(body=constructor.body.with_changes(body=lines))
    spaced = [_spaced(method) for method in added]
    return node.with_changes(body=node.body.with_changes(body=[*body, *spaced]))
