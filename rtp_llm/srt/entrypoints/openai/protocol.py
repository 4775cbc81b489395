"""OpenAI's objects: requests, strictly checked, and answers.

Types are strict (no "1" for 1), and unknown fields are errors. ``None`` is the same as leaving a field out. Fields that
other servers know and this one does not support are errors, unless their value is neutral
(``entrypoints/neutral.py``).
"""
# long: a client's fields are looked up here, object by object

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.neutral import CHAT, OPENAI, without_neutral
from rtp_llm.srt.entrypoints.tool_choice import Choice, ToolFields, check_choice, choice_of, tool_fields
from rtp_llm.srt.sampling_params import MAX_STOP_STRINGS, InvalidRequest

MAX_LOGPROBS = 20  # alternatives per token
MAX_CHOICES = 128  # n
MAX_PROMPTS = 2048
MAX_TOOLS = 1024
MAX_TOOLS_CHARS = 1 << 20
FUNCTION_NAME = r"^[\w.:/@$-]+$"

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Budget = Annotated[int, Field(ge=-1)]
Salt = Annotated[str, Field(max_length=256)]


class Body(BaseModel):
    """A JSON object of a request. ``unsupported``: see ``neutral.without_neutral``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return without_neutral(values, cls.unsupported, supported=cls.model_fields)


class StreamOptions(Body):
    include_usage: bool = Field(False, description="a last chunk with the usage of the whole request")
    continuous_usage_stats: bool = Field(False, description="the usage so far in every chunk")


class GenerationBody(Body):
    """Fields that chat and text completions share."""

    unsupported = OPENAI

    model: str | None = Field(None, description="one of /v1/models; may be left out")
    temperature: Finite | None = Field(None, ge=0, description="0 is greedy; higher is more random")
    top_p: Finite | None = Field(
        None, ge=0, le=1, description="sample from the smallest set with this probability; 0: the most probable token"
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="choices per prompt")
    max_tokens: int | None = Field(None, ge=0, description="most tokens to generate")
    stop: str | list[str] | None = Field(None, description=f"at most {MAX_STOP_STRINGS} strings that end the text")
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1, description="makes the draws reproducible")
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Finite] | None = Field(None, description="token id to what is added to its logit")
    stream: bool | None = Field(None, description="server-sent events as the text comes")
    stream_options: StreamOptions | None = None

    top_k: int | None = Field(None, ge=-1, description="extension: sample from the k most probable; -1, 0: all")
    min_p: Finite | None = Field(None, ge=0, le=1, description="extension: least probability relative to the best")
    repetition_penalty: Finite | None = Field(None, gt=0, description="extension: > 1 discourages what was said")
    min_tokens: int | None = Field(None, ge=0, description="extension: no stop condition holds before so many tokens")
    bad_words: str | list[str] | None = Field(None, description="extension: texts that are not generated")
    allowed_token_ids: TokenIds | None = Field(None, description="extension: only these token ids are generated")
    stop_token_ids: TokenIds | None = Field(None, description="extension: ids that end the text")
    ignore_eos: bool | None = Field(None, description="extension: go on after an end-of-sequence token")
    include_stop_str_in_output: bool | None = Field(None, description="extension: the stop string stays in the text")
    no_stop_trim: bool | None = Field(None, description="extension: another name of include_stop_str_in_output")
    skip_special_tokens: bool | None = Field(None, description="extension: leave special tokens out of the text")
    response_format: dict[str, Any] | None = Field(
        None, description='{"type": "json_schema", "json_schema": {"name", "schema"}}, "json_object", "text"'
    )
    structured_outputs: dict[str, Any] | None = Field(
        None, description="extension: one of json, regex, choice, grammar, json_object, structural_tag"
    )
    json_schema: str | dict[str, Any] | None = Field(None, description="extension: the text is such JSON")
    regex: str | None = Field(None, description="extension: the text matches this regular expression")
    ebnf: str | None = Field(None, description="extension: a grammar of the text, in GBNF or in Lark")
    grammar: str | None = Field(None, description="extension: another name of ebnf")
    structural_tag: str | dict[str, Any] | None = Field(None, description="extension: tags within free text")
    cache_salt: Salt | None = Field(None, description="extension: share cached prefixes only with equal salts")
    priority: int | None = Field(None, description="extension: lower is earlier; with --schedule-policy priority")
    rid: Name | None = Field(None, description="extension: for /abort_request")

    user: str | None = Field(None, description="accepted; not used")
    metadata: dict[str, str] | None = Field(None, description="accepted; not used")
    safety_identifier: str | None = Field(None, description="accepted; not used")
    prompt_cache_key: str | None = Field(None, description="accepted; the prefix cache needs no key")
    prompt_cache_retention: str | None = Field(None, description="accepted; not used")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one tool call; only of chats")

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        options = self.stream_options
        if options is not None and not self.stream and (options.include_usage or options.continuous_usage_stats):
            raise InvalidRequest("stream_options is only for stream=true", "stream_options")
        return self

    @model_validator(mode="after")
    def _check_grammar(self) -> Self:
        if self.grammar and self.ebnf is not None:
            raise InvalidRequest("ebnf and grammar are names of one field: give one of them", "grammar")
        return self

    @property
    def grammar_names(self) -> dict[str, str]:
        """The name that errors have for ``ebnf``, if the body has another: the engine's -> the body's."""
        return {"ebnf": "grammar"} if self.grammar else {}


class Message(BaseModel):
    """A message of a conversation; it may have further fields for the chat template."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, values: Any) -> Any:
        """Leave out null fields of parts, and hints on messages and parts (``cache_control``)."""
        if not isinstance(values, dict):
            return values
        values = without_neutral(values, {})
        if isinstance(content := values.get("content"), list):
            values["content"] = [without_neutral(part, {}) if isinstance(part, dict) else part for part in content]
        return values

    role: str = Field(description="system, developer, user, assistant, or what the chat template knows")
    content: str | list[dict[str, Any]] | None = Field(
        None,
        description='text, or parts: {"type": "text", "text"}, {"type": "image_url", "image_url": {"url", "detail"}}, '
        '{"type": "video_url", "video_url": {"url"}}',
    )


class FunctionDefinition(Body):
    name: str = Field(pattern=FUNCTION_NAME, max_length=256, description="letters, digits and _ . : / @ $ -")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments, an object")
    strict: bool | None = Field(None, description="true: arguments of its calls fit the schema; a 400 if they cannot")

    def shown(self) -> dict[str, Any]:
        """Return it as templates get it, in the order in which models learned it."""
        parameters = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        return {"name": self.name, "description": self.description or "", "parameters": parameters}


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, values: Any) -> Any:
        check_is_function(values)
        return values


def check_is_function(tool: Any) -> None:
    """Raise InvalidRequest for a tool of another type, which the server would have to run or does not know."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise InvalidRequest(f"tools of type {kind[:40]!a} are not supported: only functions are", "tools")


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction

    def choice(self) -> Choice:
        return Choice("required", (self.function.name,))


class AllowedFunctions(Body):
    mode: Literal["auto", "required"] = Field(description="required: it must call one of them")
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedTools(Body):
    """The functions that the model may call; it sees all, so that the prompt stays the same."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions

    def choice(self) -> Choice:
        return Choice(self.allowed_tools.mode, tuple(tool.function.name for tool in self.allowed_tools.tools))


ChatToolChoice = Literal["auto", "none", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]


def shown_tools(functions: Iterable[FunctionDefinition]) -> list[dict[str, Any]]:
    """Return tools as templates get them, which fail on functions without description or parameters."""
    return [{"type": "function", "function": function.shown()} for function in functions]


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise InvalidRequest if two of these shown tools have one name, the arguments of one are no object, or all
    together are too long or nested too deeply."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"tools has two functions of the name {twice!r}", "tools")
    for tool in tools:
        _check_parameters(tool["function"])
    try:
        num_chars = len(json.dumps(tools))
    except RecursionError:
        raise InvalidRequest("tools is nested too deeply", "tools") from None
    if num_chars > MAX_TOOLS_CHARS:
        message = f"tools has {num_chars} characters as JSON; at most {MAX_TOOLS_CHARS} are taken"
        raise InvalidRequest(message, "tools")


def _check_parameters(function: Mapping[str, Any]) -> None:
    name, kind = function["name"], function["parameters"].get("type") or "object"
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidRequest(
            f"tools: the parameters of {name} must be the schema of an object, not of type {str(kind)[:64]!a}", "tools"
        )


class ChatCompletionRequest(GenerationBody):
    unsupported = CHAT

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, description="most tokens to generate; unset: the room left")
    logprobs: bool | None = Field(None, description="log-probabilities of the answer's tokens")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="alternatives per token")
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="functions that the model may call")
    tool_choice: ChatToolChoice | None = Field(
        None,
        description="none: the model does not see the tools; required, or a function: it must call; allowed_tools: "
        "which it may or must call",
    )
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = Field(
        None, description="none, low, medium, high, or what the chat template knows; none: no thinking"
    )
    separate_reasoning: bool | None = Field(None, description="extension: false: thinking stays in the content")
    include_reasoning: bool | None = Field(None, description="extension: false: thinking is not sent")
    stream_reasoning: bool | None = Field(
        None, description="extension: false: a stream's thinking comes at once, when it has ended"
    )
    thinking_token_budget: Budget | None = Field(None, description="extension: most tokens of thinking; -1: any number")
    thinking_budget: Budget | None = Field(None, description="extension: another name of thinking_token_budget")
    max_thinking_tokens: Budget | None = Field(None, description="extension: another name of thinking_token_budget")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="extension: variables of the chat template")
    add_generation_prompt: bool | None = Field(None, description="extension: false: do not begin an assistant turn")
    continue_final_message: bool | None = Field(None, description="extension: go on with the last message")

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs is only for logprobs=true", "top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            message = f"max_tokens ({both[0]}) and max_completion_tokens ({both[1]}) differ; give one"
            raise InvalidRequest(message, "max_completion_tokens")
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        tools = shown_tools(tool.function for tool in self.tools or ())
        check_tools(tools)
        check_choice(choice_of(self.tool_choice), tools)

    def tool_fields(self) -> ToolFields:
        functions = [tool.function for tool in self.tools or ()]
        strict = (function.name for function in functions if function.strict)
        return tool_fields(choice_of(self.tool_choice), shown_tools(functions), strict)


class CompletionRequest(GenerationBody):
    prompt: str | list[str] | TokenIds | list[TokenIds] = Field(description="a text, token ids, or a list of either")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="alternatives per token")
    echo: bool | None = Field(None, description="the prompt comes first, its logprobs too")
    add_special_tokens: bool | None = Field(None, description="extension: false: none are put around the prompt")
    best_of: int | None = Field(None, description="only the value of n")

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest(f"best_of is not supported but as the same number as n ({self.n or 1})", "best_of")
        if isinstance(self.prompt, list) and len(self.prompt) > MAX_PROMPTS and not isinstance(self.prompt[0], int):
            raise InvalidRequest(
                f"prompt is a list of {len(self.prompt)}; at most {MAX_PROMPTS} are taken at once", "prompt"
            )
        return self


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length", "abort", "tool_calls"]


class CalledFunction(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    """``reasoning`` is the same as ``reasoning_content``; both are there only if the model thought."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CalledFunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The first of a call has its id, type and name; the arguments of all together are the JSON text."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    reasoning: str
    tool_calls: list[ToolCallDelta]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(TypedDict):
    """A text completion, or a chunk of one, which has ``usage`` only on request."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class InputTokens(TypedDict):
    """How many tokens a request's prompt has."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]
