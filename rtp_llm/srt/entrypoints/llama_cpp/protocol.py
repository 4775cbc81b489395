"""llama.cpp's objects: requests, strictly checked as those of OpenAI (``openai/protocol.py``), and answers."""

from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from rtp_llm.srt.entrypoints.neutral import LLAMA_CPP, LLAMA_CPP_PROMPT
from rtp_llm.srt.entrypoints.openai.protocol import MAX_CHOICES, MAX_LOGPROBS, MAX_PROMPTS, Body, Finite
from rtp_llm.srt.sampling_params import MAX_STOP_STRINGS, InvalidRequest

MAX_FIELDS = 64  # of response_fields
MAX_EXTRAS = 1024  # files around one that is filled in
MAX_NAME_CHARS = 1024
RANDOM_SEEDS = (-1, 2**32 - 1)  # llama.cpp's two ways to write that any seed will do
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[tuple[TokenId | str, Finite | Literal[False]], Field(strict=False)]  # JSON has lists, and no tuples


class PromptObject(Body):
    unsupported = LLAMA_CPP_PROMPT

    prompt_string: str


Pieces = Annotated[list[TokenId | str], Field(fail_fast=True)]  # token ids and texts in a row
PromptValue = str | PromptObject | Pieces
Prompts = Annotated[list[TokenId | PromptValue], Field(fail_fast=True)]


class CompletionOptions(Body):
    """What /completion and /infill have in common."""

    unsupported = LLAMA_CPP

    n_predict: int | None = Field(None, ge=-1, description="most tokens to generate; -1: the room left in the context")
    temperature: Finite | None = Field(None, ge=0, description="0 is greedy; higher is more random")
    top_k: int | None = Field(None, ge=-1, description="sample from the k most probable; 0, -1: all")
    top_p: Finite | None = Field(None, ge=0, le=1, description="sample from the smallest set with this probability")
    min_p: Finite | None = Field(None, ge=0, le=1, description="least probability relative to the best")
    repeat_penalty: Finite | None = Field(None, gt=0, description="> 1 discourages what was said")
    repeat_last_n: int | None = Field(None, ge=-1, description="with repeat_penalty only -1: all of the text counts")
    presence_penalty: Finite | None = Field(None, ge=-2, le=2)
    frequency_penalty: Finite | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(
        None, ge=-1, le=2**64 - 1, description="makes the draws reproducible; -1: another each time"
    )
    stop: str | list[str] | None = Field(None, description=f"at most {MAX_STOP_STRINGS} strings that end the text")
    ignore_eos: bool | None = Field(None, description="go on after an end-of-sequence token")
    logit_bias: dict[str, Finite] | list[Bias] | None = Field(
        None, description="[[token id or text, what is added to its logits, or false: never]], or an object of them"
    )
    grammar: str | None = Field(None, description="GBNF of the text; an empty one: none")
    json_schema: dict[str, Any] | None = Field(None, description="the text is such JSON")
    n_probs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="alternatives per token; 0: no probabilities")
    n_cmpl: int | None = Field(None, ge=1, le=MAX_CHOICES, description="completions of each prompt")
    stream: bool | None = Field(None, description="server-sent events as the text comes")
    return_tokens: bool | None = Field(None, description="the token ids, too")
    cache_prompt: bool | None = Field(None, description="false: the prompt shares no cached prefix with other requests")
    response_fields: list[str] | None = Field(
        None, max_length=MAX_FIELDS, description='of the whole answer only these, such as "generation_settings/seed"'
    )

    @model_validator(mode="after")
    def _check_penalty(self) -> Self:
        if self.repeat_last_n not in (None, -1) and self.repeat_penalty not in (None, 1):
            raise InvalidRequest(
                "repeat_last_n: repeat_penalty looks at all of the text here: leave it out, or send -1", "repeat_last_n"
            )
        return self

    @property
    def params(self) -> dict[str, Any]:
        """The sampling parameters given, under the engine's names, but for ``logit_bias``."""
        given = {
            "max_new_tokens": None if self.n_predict == -1 else self.n_predict,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": None if self.seed in RANDOM_SEEDS else self.seed,
            "stop": self.stop,
            "ignore_eos": self.ignore_eos,
            "ebnf": self.grammar or None,
            "json_schema": self.json_schema,
            "n": self.n_cmpl,
        }
        return {name: value for name, value in given.items() if value is not None}


class LlamaCompletionRequest(CompletionOptions):
    """The body of /completion."""

    prompt: str | PromptObject | Prompts = Field(
        description="a text, token ids, both in a row, or a list of such prompts"
    )

    def prompts(self) -> list[str | PromptObject | Pieces]:
        """Return each of the prompts. A list with a token id among its members is one prompt."""
        given = self.prompt
        if not isinstance(given, list):
            return [given]
        if not given:
            raise InvalidRequest("prompt is empty: there must be at least one token to continue", "prompt")
        if any(isinstance(item, int) for item in given):
            if not all(isinstance(item, int | str) for item in given):
                raise InvalidRequest("prompt: token ids are mixed with other things than texts", "prompt")
            return [given]  # type: ignore[list-item]
        if len(given) > MAX_PROMPTS:
            raise InvalidRequest(f"prompt is a list of {len(given)}; at most {MAX_PROMPTS} are taken at once", "prompt")
        return list(given)  # type: ignore[arg-type]


class ExtraFile(Body):
    text: str
    filename: str = Field("tmp", max_length=MAX_NAME_CHARS)


class InfillRequest(CompletionOptions):
    """The body of /infill."""

    input_prefix: str = Field(description="the text before what is filled in")
    input_suffix: str = Field(description="the text after it")
    input_extra: list[ExtraFile] | None = Field(None, max_length=MAX_EXTRAS, description="other files, for context")
    prompt: str | None = Field(None, description="text that goes on from input_prefix: the line so far")


class Timings(TypedDict):
    """Tokens, milliseconds, tokens per second. ``prompt_n`` leaves out ``cache_n``, those found in the prefix cache."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class TokenProbability(TypedDict):
    id: int
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: NotRequired[list["TokenProbability"]]


class LlamaCompletion(TypedDict):
    """A completion, or a part of one in a stream, which has the first seven fields only. Of several a list."""

    index: int
    content: str
    tokens: list[int]
    stop: bool
    tokens_predicted: int
    tokens_evaluated: int
    completion_probabilities: NotRequired[list[TokenProbability]]
    model: NotRequired[str]
    generation_settings: NotRequired[dict[str, Any]]
    prompt: NotRequired[str]
    has_new_line: NotRequired[bool]
    truncated: NotRequired[bool]
    stop_type: NotRequired[Literal["eos", "limit", "word"]]
    stopping_word: NotRequired[str]
    tokens_cached: NotRequired[int]
    timings: NotRequired[Timings]


class AppliedTemplate(TypedDict):
    prompt: str


class GenerationDefaults(TypedDict):
    n_ctx: int
    params: dict[str, Any]


class Properties(TypedDict):
    default_generation_settings: GenerationDefaults
    total_slots: int
    model_alias: str
    model_path: str
    modalities: dict[str, bool]
    endpoint_slots: bool
    endpoint_props: bool
    endpoint_metrics: bool
    chat_template: str
    chat_template_caps: dict[str, bool]
    bos_token: str
    eos_token: str
    build_info: str
    is_sleeping: bool
