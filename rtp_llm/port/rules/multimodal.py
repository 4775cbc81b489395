"""Models that take media: ``get_image_feature`` in front of ``embed_multimodal``, and a processor to begin with.

What the other engine's processor says of the prompt and of the encoder's inputs is read before that processor goes: the
placeholder that ``get_placeholder_str`` returns, and the fields that ``_get_mm_fields_config`` lists. The checkpoint's
own processor of transformers prepares the media here.
"""

import libcst as cst
from libcst import matchers as m

from rtp_llm.port.program import Program, code, methods, self_attribute
from rtp_llm.port.rules.base import MARK, Rule
from rtp_llm.port.rules.fold import opened, tidied
from rtp_llm.port.source import Origin, Statement

EMBED = "embed_multimodal"
_CONTEXTS = frozenset({"_mark_tower_model", "_mark_language_model", "_mark_composite_model"})
_VOID = frozenset({"configure_mm_token_handling"})
_METHODS = frozenset({"get_placeholder_str", "get_mm_lora_token_counts", "get_language_model_spec"})
_FIELDS = frozenset({"_get_mm_fields_config", "get_mm_fields_config"})
_MULTIMODAL = "rtp_llm.srt.multimodal"
_IMPORTS = {
    "BaseMultimodalProcessor": f"{_MULTIMODAL}.base_processor",
    "MultimodalSpecialTokens": f"{_MULTIMODAL}.base_processor",
    "MultimodalDataItem": f"{_MULTIMODAL}.items",
    "general_mm_embed_routine": "rtp_llm.srt.layers.multimodal",
    "pad_placeholders": f"{_MULTIMODAL}.items",
    "LogitsProcessorOutput": "rtp_llm.srt.layers.logits_processor",
    "ForwardBatch": "rtp_llm.srt.forward_batch",
    "ModelRegistry": "rtp_llm.srt.models.registry",
}
REGISTERED = "init_vllm_registered_model"
FORWARD = """
def forward(
    self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
) -> LogitsProcessorOutput:
    hidden_states = general_mm_embed_routine(
        input_ids, forward_batch, {path}.model, multimodal_model=self, positions=positions
    )
    return {path}.logits_processor(input_ids, hidden_states, {path}.lm_head, forward_batch)

def get_input_embeddings(self) -> nn.Module:
    return {path}.model.get_input_embeddings()

pad_input_ids = pad_placeholders
"""
FEATURE = f'''
def get_image_feature(self, items: list[MultimodalDataItem]) -> torch.Tensor:
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
        {MARK}the other engine's placeholders are {{placeholders}}: see that the prompt has this one per image
        self.mm_tokens = MultimodalSpecialTokens(image_token={{image}}).build(_processor)

    {MARK}the checkpoint's processor of transformers expands placeholders; where it does not, define replacement(item)
    async def process_mm_data_async(self, image_data, audio_data, input_text, request_obj, **kwargs):
        return await self.process(image_data, audio_data, input_text, request_obj)
"""


class TakeMedia(Rule):
    """Contexts and bookkeeping of the other engine go; ``get_image_feature`` is written before ``embed_multimodal``."""

    def __init__(self, program: Program, fields: list[str]) -> None:
        super().__init__(program)
        self.fields = fields
        found = {name: _language_model(node, program) for name, node in program.classes().items()}
        self.paths = {name: path for name, path in found.items() if path}  # class -> its language model

    def _forward(self) -> cst.FlattenSentinel[cst.BaseStatement]:
        self.count("forward made the routine that puts media in their places")
        _need_imports(
            self.program, "general_mm_embed_routine", "pad_placeholders", "LogitsProcessorOutput", "ForwardBatch"
        )
        body = cst.parse_module(FORWARD.replace("{path}", self.paths[self.class_stack[-1]])).body
        return cst.FlattenSentinel([body[0], *(_spaced(statement) for statement in body[1:])])

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        """A language model that the other engine's registry makes is made by ours."""
        if not self.program.is_engine(original_node.func, REGISTERED):
            return updated_node
        given = {arg.keyword.value: code(arg.value) for arg in updated_node.args if arg.keyword}
        config = given.get("hf_config", "config.get_text_config()")
        names = given.get("architectures", f"{config}.architectures")
        self.review("where this configuration names no architectures, call the class of the language model instead")
        _need_imports(self.program, "ModelRegistry")
        prefix = given.get("prefix", "prefix")
        return cst.parse_expression(f"ModelRegistry.resolve_model_cls({names})[0]({config}, quant_config, {prefix})")

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
        self.count("get_image_feature written")
        feature = next((field for field in self.fields if "pixel" in field), "pixel_values")
        others = tuple(field for field in self.fields if field != feature and "embeds" not in field)
        text = FEATURE.replace("{feature}", feature).replace("{others}", repr(others))
        _need_imports(self.program, "MultimodalDataItem")
        self.program.imports.setdefault("torch", Origin("torch"))
        return cst.FlattenSentinel([noted, _parsed(text)])  # type: ignore[list-item]

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


def _fields(program: Program) -> list[str]:
    """Names of the encoder's inputs, as the other engine's processors list them."""
    functions = [
        method for node in program.classes().values() for name, method in methods(node).items() if name in _FIELDS
    ]
    found: list[str] = []
    for function in functions:
        for call in m.findall(function, m.Call(func=m.Name("dict"))):
            found += [arg.keyword.value for arg in call.args if arg.keyword]  # type: ignore[attr-defined]
        for element in m.findall(function, m.DictElement(key=m.SimpleString())):
            found.append(str(element.key.evaluated_value))  # type: ignore[attr-defined]
    return list(dict.fromkeys(found))


def take_media(program: Program) -> None:
    """Write what the engine calls; first of all rules, since it reads what the others remove."""
    if not any(EMBED in methods(node) for node in program.classes().values()):
        return
    program.placeholders = _placeholders(program)
    program.module = program.module.visit(TakeMedia(program, _fields(program)))


def add_processor(program: Program) -> None:
    """Write a processor for each model that takes media; last of the rules that remove what nothing uses."""
    classes = program.classes()
    for name in dict.fromkeys(name for _, name in program.entries):
        if name not in classes or "get_image_feature" not in methods(classes[name]):
            continue
        _need_imports(program, "BaseMultimodalProcessor", "MultimodalSpecialTokens")
        image = next((text for text in program.placeholders if "image" in text.lower()), None)
        text = PROCESSOR.replace("{name}", name).replace("{image}", repr(image))
        text = text.replace("{placeholders}", ", ".join(map(repr, program.placeholders)) or "not given as texts")
        program.done["processors begun"] += 1
        program.module = program.module.with_changes(body=[*program.module.body, _parsed(text)])
