"""Anthropic's objects: requests, strictly checked as those of OpenAI (``openai/protocol.py``), and answers."""

from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.neutral import MESSAGES
from rtp_llm.srt.entrypoints.openai.protocol import FUNCTION_NAME, MAX_TOOLS, Body, Finite, check_tools
from rtp_llm.srt.entrypoints.tool_choice import Choice, ToolFields, check_choice, choice_of, tool_fields
from rtp_llm.srt.sampling_params import MAX_STOP_STRINGS, InvalidRequest

MIN_BUDGET_TOKENS = 1024


class TextBlock(Body):
    unsupported = {"citations": ({"enabled": False},)}

    type: Literal["text"]
    text: str


class Base64Source(Body):
    type: Literal["base64"]
    media_type: str = Field(pattern=r"^image/[\w.+-]+$", description="image/jpeg, image/png, ...")
    data: str


class URLSource(Body):
    type: Literal["url"]
    url: str


class ImageBlock(Body):
    unsupported = {"transformations": ({"oversized_image": "downsize"},)}

    type: Literal["image"]
    source: Annotated[Base64Source | URLSource, Field(discriminator="type")]


class ToolUseBlock(Body):
    """A call that the model made."""

    unsupported = {"caller": ({"type": "direct"},), "toolset_name": ()}

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Body):
    unsupported = {"toolset_name": ()}

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]] | None = None
    is_error: bool | None = Field(None, description="true: the model is told that this is an error")


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(None, description="accepted; not verified")


class RedactedThinkingBlock(Body):
    type: Literal["redacted_thinking"]
    data: str = Field(description="left out of the prompt: only its maker can read it")


Block = Annotated[
    TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock,
    Field(discriminator="type"),
]


class MessageParam(Body):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolDefinition(Body):
    unsupported = {"allowed_callers": (["direct"],), "defer_loading": (), "input_examples": ()}

    type: Literal["custom"] | None = None
    name: str = Field(pattern=FUNCTION_NAME, max_length=256, description="letters, digits and _ . : / @ $ -")
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="JSON schema of its input, an object")
    strict: bool | None = Field(None, description="true: the input of its calls fits the schema; a 400 if it cannot")
    eager_input_streaming: bool | None = Field(None, description="accepted: input is always streamed as it comes")

    def shown(self) -> dict[str, Any]:
        """Return it as templates get it, in the order in which models learned it."""
        function = {"name": self.name, "description": self.description or "", "parameters": self.input_schema}
        return {"type": "function", "function": function}


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="with type tool: which")
    disable_parallel_tool_use: bool | None = Field(None, description="true: at most one call")

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise InvalidRequest("tool_choice has a name if its type is 'tool', and only then", "tool_choice")
        return self

    def choice(self) -> Choice:
        if self.type in ("auto", "none"):
            return Choice(self.type)
        return Choice("required", None if self.name is None else (self.name,))


class ThinkingConfig(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(
        None, ge=MIN_BUDGET_TOKENS, description="with type enabled: the most tokens of thinking"
    )
    display: Literal["summarized", "omitted"] | None = Field(None, description="omitted: thinking blocks are empty")

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise InvalidRequest("thinking has budget_tokens if its type is 'enabled', and only then", "thinking")
        return self


class OutputFormat(Body):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="how much the model thinks, if its chat template has a setting for it"
    )
    format: OutputFormat | None = Field(None, description="the text is such JSON")


class CountTokensRequest(Body):
    unsupported: ClassVar = MESSAGES

    model: str | None = Field(None, description="one of /v1/models; may be left out")
    messages: list[MessageParam] = Field(min_length=1)
    system: str | list[TextBlock] | None = Field(None, description="what the model is told first")
    tools: list[ToolDefinition] | None = Field(
        None, max_length=MAX_TOOLS, description="functions that the model may call"
    )
    tool_choice: ToolChoice | None = Field(
        None, description="none: the model does not see the tools; any, tool: it must call"
    )
    thinking: ThinkingConfig | None = Field(None, description="unset: as the chat template has it")
    output_config: OutputConfig | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        tools = [tool.shown() for tool in self.tools or ()]
        check_tools(tools)
        check_choice(choice_of(self.tool_choice), tools, required="any")
        return self

    def tool_fields(self) -> ToolFields:
        tools = self.tools or ()
        shown = [tool.shown() for tool in tools]
        return tool_fields(choice_of(self.tool_choice), shown, (tool.name for tool in tools if tool.strict))


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=0, description="most tokens to generate; fewer where the context ends")
    stop_sequences: list[str] | None = Field(None, description=f"at most {MAX_STOP_STRINGS} strings that end the text")
    temperature: Finite | None = Field(None, ge=0, description="0 is greedy; higher is more random")
    top_p: Finite | None = Field(None, ge=0, le=1, description="sample from the smallest set with this probability")
    top_k: int | None = Field(None, ge=-1, description="sample from the k most probable; -1, 0: all")
    stream: bool | None = Field(None, description="server-sent events as the answer comes")
    metadata: dict[str, Any] | None = Field(None, description="accepted; not used")
    thread: dict[str, Any] | None = Field(None, description="refused: conversations are not kept here")

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise InvalidRequest(
                f"thinking.budget_tokens ({budget}) must be less than max_tokens ({self.max_tokens})", "thinking"
            )
        return self


class OutputTokensDetails(TypedDict):
    thinking_tokens: int


class MessageUsage(TypedDict):
    """The prompt's tokens are ``input_tokens`` and ``cache_read_input_tokens`` together."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class AnswerBlock(TypedDict):
    """A text, thinking with its signature, or a call (``tool_use``) with id, name and input."""

    type: Literal["text", "thinking", "tool_use"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[dict[str, Any]]


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class AnswerMessage(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokensCount(TypedDict):
    input_tokens: int
