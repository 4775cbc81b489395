"""Ollama's objects: requests, strictly checked as those of OpenAI (``openai/protocol.py``), and answers."""

import re
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self

from pydantic import Field, field_validator, model_validator
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.neutral import OLLAMA_CHAT, OLLAMA_GENERATE, OLLAMA_OPTIONS, OLLAMA_SHOW
from rtp_llm.srt.entrypoints.openai.protocol import (
    MAX_LOGPROBS,
    MAX_TOOLS,
    Body,
    Finite,
    FunctionDefinition,
    TokenIds,
    TopLogprob,
    check_tools,
)
from rtp_llm.srt.sampling_params import MAX_STOP_STRINGS, InvalidRequest

DURATION = re.compile(r"[-+]?(?:0|(?:(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+)")  # as Go writes them
SHOWN_CHARS = 40
Whole = Annotated[int, Field(ge=0)]


class Options(Body):
    unsupported = OLLAMA_OPTIONS

    num_predict: int | None = Field(None, ge=-2, description="most tokens to generate; -1, -2 and unset: the room left")
    temperature: Finite | None = Field(None, ge=0, description="0 is greedy; higher is more random")
    top_k: int | None = Field(None, ge=-1, description="sample from the k most probable; -1, 0: all")
    top_p: Finite | None = Field(None, ge=0, le=1, description="sample from the smallest set with this probability")
    min_p: Finite | None = Field(None, ge=0, le=1, description="least probability relative to the best")
    seed: int | None = Field(
        None, ge=-(2**63), le=2**64 - 1, description="makes the draws reproducible; -1: another one each time"
    )
    stop: str | list[str] | None = Field(None, description=f"at most {MAX_STOP_STRINGS} strings that end the text")
    repeat_penalty: Finite | None = Field(None, gt=0, description="> 1 discourages what prompt and answer said")
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    repeat_last_n: int | None = Field(
        None, ge=-1, description="0: no penalties; -1: they look at all of the text; others only without penalties"
    )
    penalize_newline: bool | None = Field(None, description="false only without repeat_penalty")
    num_ctx: int | None = Field(None, ge=0, description="at most the server's context, which is there in any case")

    mirostat_eta: Finite | None = Field(None, description="accepted, as is mirostat_tau: mirostat itself is refused")
    mirostat_tau: Finite | None = None
    num_keep: int | None = Field(None, description="accepted: no context is shifted here")
    num_batch: int | None = Field(None, description="accepted, as those below: the server's start decides it")
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    f16_kv: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None


def check_keep_alive(value: float | str | None) -> float | str | None:
    """Return it. Raise InvalidRequest for a text that is no duration."""
    if isinstance(value, str) and DURATION.fullmatch(value) is None:
        shown = value[:SHOWN_CHARS]
        raise InvalidRequest(
            f"keep_alive must be a number of seconds or a duration such as '5m' or '1h30m', not {shown!a}",
            "keep_alive",
        )
    return value


class CalledFunction(Body):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    index: int | None = Field(None, description="accepted: calls come in order")


class ToolCall(Body):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class Message(Body):
    role: str = Field(description="system, user, assistant, tool, or what the chat template knows, in any case")
    content: str | None = None
    thinking: str | None = Field(None, description="of an assistant")
    images: list[str] | None = Field(None, description="in base64; they come before the content")
    tool_calls: list[ToolCall] | None = Field(None, description="of an assistant")
    tool_name: str | None = Field(None, description="of a tool: which function this is the result of")
    name: str | None = Field(None, description="another name of tool_name")
    tool_call_id: str | None = Field(None, description="of a tool: which call this is the result of")

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if None not in (self.name, self.tool_name) and self.name != self.tool_name:
            raise InvalidRequest("a message's name and tool_name differ; give one", "messages")
        return self


class Tool(Body):
    unsupported = {"items": ()}

    type: Literal["function"] | None = None
    function: FunctionDefinition

    def shown(self) -> dict[str, Any]:
        """Return it as templates get it."""
        return {"type": "function", "function": self.function.shown()}


class AskingBody(Body):
    """Fields that chats and completions share."""

    model: str | None = Field(None, description="one of /api/tags, also without its tag :latest; may be left out")
    format: str | dict[str, Any] | None = Field(None, description='"json", or a JSON schema that the answer follows')
    options: Options | None = None
    stream: bool | None = Field(None, description="false: one object; otherwise a line of JSON for each part")
    keep_alive: Finite | str | None = Field(None, description="accepted: the model stays as long as the server runs")
    think: bool | Annotated[str, Field(min_length=1, max_length=32)] | None = Field(
        None, description='true, false, or how much, such as "low"; unset: as the chat template has it'
    )
    logprobs: bool | None = Field(None, description="log-probabilities of the answer's tokens")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="alternatives per token")
    truncate: bool | None = Field(None, description="accepted: a prompt that is too long is an error, never cut")
    shift: bool | None = Field(None, description="accepted: an answer ends where the context does")

    @field_validator("format", mode="after")
    @classmethod
    def _check_format(cls, value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if isinstance(value, str) and value not in ("", "json"):
            shown = value[:SHOWN_CHARS]
            raise InvalidRequest(f"format must be 'json' or a JSON schema, which is an object, not {shown!a}", "format")
        return value or None

    @field_validator("keep_alive", mode="after")
    @classmethod
    def _check_keep_alive(cls, value: float | str | None) -> float | str | None:
        return check_keep_alive(value)

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs is only for logprobs=true", "top_logprobs")
        return self

    @property
    def unloads(self) -> bool:
        """Whether ``keep_alive`` asks for the model to leave the memory at once."""
        value = self.keep_alive
        return value == 0 or (isinstance(value, str) and not any("1" <= digit <= "9" for digit in value))


class ChatBody(AskingBody):
    unsupported: ClassVar = OLLAMA_CHAT

    messages: list[Message] | None = Field(None, description="none: nothing is generated; the model is loaded anyway")
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="functions that the model may call")

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        check_tools(self.shown_tools())
        return self

    def shown_tools(self) -> list[dict[str, Any]]:
        return [tool.shown() for tool in self.tools or ()]

    def strict_names(self) -> frozenset[str]:
        """Return the names of the tools whose arguments must fit their schemas."""
        return frozenset(tool.function.name for tool in self.tools or () if tool.function.strict)


class GenerateBody(AskingBody):
    unsupported: ClassVar = OLLAMA_GENERATE

    prompt: str | None = Field(None, description="what the user says; empty: nothing is generated")
    suffix: str | None = Field(None, description="what stands after the answer, which fills in the middle")
    system: str | None = Field(None, description="what the model is told first")
    images: list[str] | None = Field(None, description="in base64; with raw, what the prompt's placeholders stand for")
    raw: bool | None = Field(None, description="true: the prompt is continued as it is, without the chat template")
    context: TokenIds | None = Field(None, description="of an earlier answer, which this one follows")

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.raw and (self.system or self.context):
            raise InvalidRequest("raw mode does not support system or context", "system" if self.system else "context")
        if self.raw and self.think:
            raise InvalidRequest("raw mode does not support think: the answer is not parsed", "think")
        if self.context and self.images:
            raise InvalidRequest("images and context cannot both be given: send all of it to /api/chat", "context")
        if self.suffix:
            for name in ("raw", "system", "context", "images", "think"):
                if getattr(self, name):
                    raise InvalidRequest(f"suffix does not support {name}: the prompt is nothing but both texts", name)
        return self


class ShowBody(Body):
    unsupported = OLLAMA_SHOW

    model: str | None = Field(None, description="one of /api/tags, also without its tag :latest; may be left out")
    name: str | None = Field(None, description="another name of model")
    verbose: bool | None = Field(None, description="accepted: nothing is left out")


class AnsweredFunction(TypedDict):
    index: int
    name: str
    arguments: dict[str, Any]


class AnsweredCall(TypedDict):
    id: str
    function: AnsweredFunction


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[AnsweredCall]]


class TokenLogprob(TopLogprob):
    top_logprobs: NotRequired[list[TopLogprob]]


class Metrics(TypedDict):
    """Durations are in nanoseconds. ``load_duration``: from the request to the first step, waiting included."""

    total_duration: int
    load_duration: int
    prompt_eval_count: int
    prompt_eval_cached_count: int
    prompt_eval_duration: int
    eval_count: int
    eval_duration: int


class Part(TypedDict):
    """What each object begins with."""

    model: str
    created_at: str


class End(Part):
    """The last object of an answer, or the only one."""

    done: bool
    done_reason: NotRequired[Literal["stop", "length", "load"]]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_cached_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]
    logprobs: NotRequired[list[TokenLogprob]]


class ChatReply(End):
    message: AnswerMessage


class GenerateReply(End):
    """``context`` is there at the end, unless the request was raw or had images."""

    response: str
    thinking: NotRequired[str]
    context: NotRequired[list[int]]


class Details(TypedDict):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ListedModel(TypedDict):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Models(TypedDict):
    models: list[ListedModel]


class LoadedModel(TypedDict):
    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    context_length: int


class LoadedModels(TypedDict):
    models: list[LoadedModel]


class ShownModel(TypedDict):
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class ApiVersion(TypedDict):
    version: str
