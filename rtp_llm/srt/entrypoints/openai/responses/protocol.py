"""Bodies of /v1/responses, strictly checked, and what they hold: items, tools, the form of the text.

Items of the input and of answers are JSON objects by OpenAI's names; they are kept as such once they are checked.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self

from pydantic import Discriminator, Field, Tag, model_validator
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.neutral import RESPONSES, RESPONSES_ITEMS, RESPONSES_REASONING, RESPONSES_TOOL
from rtp_llm.srt.entrypoints.openai.protocol import (
    MAX_TOOLS,
    Body,
    Finite,
    FunctionDefinition,
    Name,
    check_is_function,
    check_tools,
    shown_tools,
)
from rtp_llm.srt.entrypoints.tool_choice import Choice, ToolFields, check_choice, choice_of, tool_fields
from rtp_llm.srt.sampling_params import InvalidRequest

MAX_PAIRS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512  # of metadata
LOGPROBS = "message.output_text.logprobs"
INCLUDES = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)
Item = dict[str, Any]
Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


class ItemBody(Body):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = RESPONSES_ITEMS

    id: Id | None = Field(None, description="left out: it is given one")
    status: Status | None = Field(None, description="accepted; not used")


class InputText(Body):
    unsupported = RESPONSES_ITEMS
    type: Literal["input_text"]
    text: str


class InputImage(Body):
    unsupported = RESPONSES_ITEMS
    type: Literal["input_image"]
    image_url: str = Field(min_length=1, description="a URL, or a data: URI")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="low: at most 512 pixels a side"
    )


class OutputText(Body):
    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]] | None = Field(None, description="accepted; not used")
    logprobs: list[dict[str, Any]] | None = Field(None, description="accepted; not used")


class Refusal(Body):
    type: Literal["refusal"]
    refusal: str


class SummaryText(Body):
    type: Literal["summary_text"]
    text: str


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


Part = Annotated[InputText | InputImage | OutputText | Refusal, Field(discriminator="type")]
OutputPart = Annotated[InputText | InputImage, Field(discriminator="type")]


class MessageItem(ItemBody):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    phase: str | None = Field(None, description="accepted; not used")


class FunctionCallItem(ItemBody):
    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str = Field(description="JSON")


class FunctionCallOutputItem(ItemBody):
    type: Literal["function_call_output"]
    call_id: Name = Field(description="that of a call before it")
    output: str | list[OutputPart]


class ReasoningItem(ItemBody):
    type: Literal["reasoning"]
    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = Field(None, description="accepted; not read: it is not of this server")


class ItemReference(Body):
    type: Literal["item_reference"] = "item_reference"
    id: Name = Field(description="that of an item of a stored response")


def _kind(value: Any) -> str:
    """Return an item's type: messages need not have one, nor references to stored items."""
    if not isinstance(value, Mapping):
        return str(getattr(value, "type", "message"))
    return str(value.get("type") or ("item_reference" if set(value) == {"id"} else "message"))


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind),
]


class FunctionTool(FunctionDefinition):
    unsupported = RESPONSES_TOOL
    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, values: Any) -> Any:
        check_is_function(values)
        return values


class NamedFunction(Body):
    type: Literal["function"]
    name: str

    def choice(self) -> Choice:
        return Choice("required", (self.name,))


class AllowedTools(Body):
    """The functions that the model may call; it sees all, so that the prompt stays the same."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = Field(description="required: it must call one of them")
    tools: list[NamedFunction] = Field(min_length=1, max_length=MAX_TOOLS)

    def choice(self) -> Choice:
        return Choice(self.mode, tuple(tool.name for tool in self.tools))


ResponseToolChoice = (
    Literal["auto", "none", "required"] | Annotated[NamedFunction | AllowedTools, Field(discriminator="type")]
)


class ReasoningOptions(Body):
    unsupported = RESPONSES_REASONING
    effort: Annotated[str, Field(max_length=32)] | None = Field(
        None, description="none, low, medium, high, or what the chat template knows; none: no thinking"
    )
    summary: Literal["auto"] | None = Field(None, description="auto: there are none; the thinking itself is sent")


class PlainFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: Name
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = Field(None, description="accepted; not used")
    strict: bool | None = Field(None, description="accepted: a schema is always kept to")


class TextOptions(Body):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponseStreamOptions(Body):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": ()}


class ResponsesRequest(Body):
    unsupported = RESPONSES

    input: str | list[InputItem] = Field(description="a text, or items: messages, function calls and their outputs")
    model: str | None = Field(None, description="one of /v1/models; may be left out")
    instructions: str | None = Field(None, description="a system message before all others; of this request alone")
    previous_response_id: Name | None = Field(None, description="a stored response that this one goes on from")
    store: bool | None = Field(None, description="false: the response is not kept; otherwise it is, for a while")
    stream: bool | None = Field(None, description="server-sent events as the answer comes")
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, description="most tokens to generate; unset: the room left")
    temperature: Finite | None = Field(None, ge=0, description="0 is greedy; higher is more random")
    top_p: Finite | None = Field(None, ge=0, le=1, description="sample from the smallest set with this probability")
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS, description="functions it may call")
    tool_choice: ResponseToolChoice | None = Field(
        None,
        description="none: the model does not see the tools; required, or a function: it must call; allowed_tools: "
        "which it may or must call",
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    text: TextOptions | None = Field(None, description='{"format": {"type": "text", "json_object", "json_schema"}}')
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = Field(None, max_length=MAX_PAIRS, description="comes back with the response")
    include: list[str] | None = Field(None, max_length=64, description="accepted: there is nothing to add")
    truncation: Literal["auto", "disabled"] | None = Field(None, description="only disabled")
    background: bool | None = Field(None, description="only false")
    max_tool_calls: int | None = Field(None, ge=1, description="accepted: of built-in tools, which there are none of")
    user: str | None = Field(None, description="accepted; not used")
    safety_identifier: str | None = Field(None, description="accepted; not used")
    prompt_cache_key: str | None = Field(None, description="accepted; the prefix cache needs no key")
    prompt_cache_retention: str | None = Field(None, description="accepted; not used")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.background:
            raise InvalidRequest(
                "background must be false: this server answers while the client waits; use stream", "background"
            )
        if self.truncation == "auto":
            raise InvalidRequest(
                "truncation must be 'disabled': this server leaves nothing of the input out", "truncation"
            )
        for name, value in (self.metadata or {}).items():
            if len(name) > MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS:
                raise InvalidRequest(
                    f"metadata: names have at most {MAX_KEY_CHARS} characters, values {MAX_VALUE_CHARS}", "metadata"
                )
        check_includes(self.include or ())
        tools = shown_tools(self.tools or ())
        check_tools(tools)
        check_choice(choice_of(self.tool_choice), tools)
        return self

    def tool_fields(self) -> ToolFields:
        tools = self.tools or ()
        return tool_fields(
            choice_of(self.tool_choice), shown_tools(tools), (tool.name for tool in tools if tool.strict)
        )


def check_includes(names: Any) -> None:
    """Raise InvalidRequest if something is to be included that there is not."""
    for name in names:
        if name not in INCLUDES:
            raise InvalidRequest(f"include: {name[:64]!r} is not supported; known are {', '.join(INCLUDES)}", "include")


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """``cache_write_tokens`` are those that a provider charges for; here none."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: NotRequired[str]


class DeletedResponse(TypedDict):
    id: str
    object: Literal["response"]
    deleted: bool


class ItemList(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
