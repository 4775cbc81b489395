"""State and steps that all endpoints share, from a request's body to a running call."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Protocol, TypeVar, cast

from pydantic import BaseModel
from transformers.utils.chat_parsing.response_templates import ResponseTemplate

from rtp_llm.srt.chat.messages import ChatPrompt, MediaRules
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import HF, ServerArgs, ServerArgsError
from rtp_llm.srt.constrained.spec import asks_for_grammar
from rtp_llm.srt.constrained.token_bytes import special_tokens
from rtp_llm.srt.conversation import NO_CHAT_TEMPLATE, Template
from rtp_llm.srt.entrypoints.errors import ApiError, invalid, unavailable
from rtp_llm.srt.entrypoints.frontend import Frontend, LiveCall
from rtp_llm.srt.entrypoints.neutral import strict_requests
from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.managers.engine_client import Client
from rtp_llm.srt.managers.generate_options import OPTION_NAMES, GenerateOptions
from rtp_llm.srt.managers.text_encoder import LONG_TEXT
from rtp_llm.srt.managers.tokenizer_manager import Prompt, TokenizerManager
from rtp_llm.srt.messages import CoreInfo, CoreStats, GenerateRequest
from rtp_llm.srt.parser.choose import choose_format
from rtp_llm.srt.parser.formats import Format
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.srt.utils.workers import Busy, Overdue, Workers
from rtp_llm.version import __version__

T = TypeVar("T")

NUM_WORKERS = 4
NUM_TEMPLATE_WORKERS = 2  # rendering is Python: more threads would share the GIL
ABORTED_BY_CALLER = 499
MODEL_MEDIA = frozenset({"image", "video"})
TEMPLATE_ARGUMENTS = ("self", "messages", "add_generation_prompt", "continue_final_message", "tools")


class Core(Protocol):
    """The server's view of the core, or of several: a supervisor of engine/, or a test's own."""

    @property
    def client(self) -> Client: ...
    @property
    def info(self) -> CoreInfo: ...
    @property
    def is_ready(self) -> bool: ...
    @property
    def stats(self) -> CoreStats: ...


@dataclass(slots=True)
class Serving:
    args: ServerArgs
    model_config: ModelConfig
    core: Core
    frontend: Frontend
    template: Template | None
    response_template: ResponseTemplate | None = None  # the checkpoint's own form of answers
    answer_format: Format = field(init=False)  # otherwise: of the model's thinking and tool calls
    created: int = field(default_factory=lambda: int(time.time()))
    workers: Workers = field(default_factory=lambda: Workers(NUM_WORKERS, "rtp-llm-text"))
    _template_workers: Workers = field(default_factory=lambda: Workers(NUM_TEMPLATE_WORKERS, "rtp-llm-template"))
    _special_token_ids: Mapping[str, int] | None = None  # once they are asked for
    _num_entering: int = 0  # sequences that were admitted and are not live yet

    def __post_init__(self) -> None:
        text = "" if self.template is None else self.template.text
        names = (self.args.tool_call_parser, self.args.reasoning_parser)
        if HF in names and self.response_template is None:
            raise ServerArgsError(f"the parser {HF!r} reads the tokenizer's response_template, and it has none")
        if any(name not in (None, HF) for name in names):
            self.response_template = None
        self.answer_format = choose_format(text, *(None if name == HF else name for name in names))

    @property
    def special_token_ids(self) -> Mapping[str, int]:
        """The tokenizer's special tokens: text -> id."""
        if self._special_token_ids is None:
            self._special_token_ids = special_tokens(self.manager.tokenizer)
        return self._special_token_ids

    @property
    def answer_tags(self) -> tuple[str, ...]:
        """The texts whose special tokens the parser of answers must see."""
        if self.response_template is None:
            return self.answer_format.tags
        return tuple(self.manager.tokenizer.all_special_tokens)

    @property
    def model_name(self) -> str:
        return self.args.model_name

    @property
    def fingerprint(self) -> str:
        """A hash that changes when the same request with the same seed may get another answer."""
        args, config = self.args, self.model_config
        parts = (__version__, args.model_path, args.revision, config.dtype, args.quantization, args.kv_cache_dtype)
        return "fp_" + sha256(repr(parts).encode()).hexdigest()[:10]

    @property
    def manager(self) -> TokenizerManager:
        return self.frontend.manager

    @property
    def sampling_defaults(self) -> dict[str, float | int]:
        """Sampling parameters of /v1 requests that do not give them."""
        return self.model_config.generation_defaults if self.args.sampling_defaults == "model" else {}

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.args.model_names and not self.args.accept_any_model_name:
            message = (
                f"there is no model {name!a} here; this server has {' and '.join(map(repr, self.args.model_names))}"
            )
            raise ApiError(404, message, "model", "model_not_found")

    def check_tokenizer(self) -> None:
        if self.manager.tokenizer is None:
            raise ApiError(400, "the server runs without a tokenizer: use /generate with input_ids")

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any] | None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> ChatPrompt:
        """Render messages with the chat template, tools and these further variables into a prompt with media.

        A template is a program whose run time depends on the request: it runs on another thread, within
        ``--template-timeout``.
        """
        template = self.template
        if template is None:
            no_text = self.manager.outputs.problem(None)
            raise InvalidRequest(NO_CHAT_TEMPLATE, "messages") if no_text is None else InvalidRequest(no_text, "model")
        for name in variables or {}:
            if name in TEMPLATE_ARGUMENTS:
                raise InvalidRequest(f"chat_template_kwargs cannot set {name!r}", "chat_template_kwargs")
        if not strict_requests.get():  # unused variables are neutral
            variables = {name: value for name, value in (variables or {}).items() if template.uses(name)}
        prompt = partial(
            template.prompt,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=variables,
            media=self.media_rules,
        )
        timeout_s = self.args.template_timeout
        try:
            return await self._template_workers.run(prompt, timeout_s)
        except Overdue:
            raise InvalidRequest(
                f"the model's chat template has not ended within {timeout_s:g} s on these messages "
                "(--template-timeout)",
                "messages",
            ) from None
        except Busy:
            raise unavailable("the chat templates of other requests take too long", "templates_busy") from None

    @property
    def media_rules(self) -> MediaRules:
        """The media that messages of a chat may hold."""
        kinds = MODEL_MEDIA if self.model_config.is_multimodal else frozenset()
        return MediaRules(kinds, self.args.media_limits)

    async def encode_chat(self, chat: ChatPrompt) -> Prompt:
        """Encode a chat's prompt, and fetch, decode and place its media."""
        if not chat.has_media:
            return Prompt(input_ids=await self.encode(chat.text, chat.add_special_tokens))
        return await self.manager.with_media(
            Prompt(
                text=chat.text,
                image_data=chat.image_data or None,
                video_data=chat.video_data or None,
                add_special_tokens=chat.add_special_tokens,
            )
        )

    async def encode(self, text: str, add_special_tokens: bool, is_prompt: bool = True) -> list[int]:
        """See TokenizerManager.encode."""
        return await self.off_loop(len(text), lambda: self.manager.encode(text, add_special_tokens, is_prompt))

    async def requests(self, prompt: Prompt) -> list[GenerateRequest]:
        """See TokenizerManager.requests. A grammar, whose check may take a second, is checked on another thread."""
        work = partial(self.manager.requests, prompt)
        return await self.off_loop(0, work, has_grammar=asks_for_grammar(prompt.sampling_params))

    async def off_loop(self, num_chars: int, function: Callable[[], T], has_grammar: bool = False) -> T:
        """Return ``function()``, run on another thread if it encodes or decodes a long text, or checks a grammar."""
        return await self.workers.run(function) if has_grammar or num_chars > LONG_TEXT else function()

    @contextmanager
    def admission(self, num_sequences: int, param: str) -> Iterator[None]:
        """Reserve room for the sequences of a request until it is started, before any work on it.

        Raises:
            ApiError: 400 if ``param`` asks for more sequences than a request may have; 503 if the core is not
                ready, or the queue is full.
        """
        limit = self.args.max_sequences_per_request
        if num_sequences > limit:
            raise ApiError(
                400,
                f"the request asks for {num_sequences} sequences (prompts times n); at most {limit} are taken in one "
                "request (--max-sequences-per-request): send several",
                param,
                "too_many_sequences",
            )
        self._check_room(num_sequences)
        self._num_entering += num_sequences
        try:
            yield
        finally:
            self._num_entering -= num_sequences

    def _check_room(self, num_sequences: int) -> None:
        if not self.core.is_ready:
            raise unavailable("the engine core is starting", "not_ready")
        if self.args.max_queued_requests is None:
            return
        most = self.core.info.max_running_requests + self.args.max_queued_requests
        num_taken = self.core.client.num_live + self._num_entering
        if num_taken + num_sequences > most:
            raise unavailable(
                f"the queue is full: {num_taken} sequences run or wait, this request has {num_sequences}, and at most "
                f"{most} may (--max-queued-requests)",
                "queue_full",
            )

    def start(self, completions: list[Completion], many: bool = True) -> LiveCall:
        """Submit admitted completions. Raise a 503 if the core has died meanwhile."""
        if not self.core.is_ready:
            raise unavailable("the engine core is starting", "not_ready")
        return self.frontend.start(completions, many)


def options_of(body: BaseModel) -> GenerateOptions:
    """Return the options given in a body, whose fields have the options' names."""
    given = {name: getattr(body, name) for name in OPTION_NAMES if name in type(body).model_fields}
    return cast(GenerateOptions, {name: value for name, value in given.items() if value is not None})


@contextmanager
def request_names(names: Mapping[str, str]) -> Iterator[None]:
    """Turn InvalidRequest into an ApiError with the request's field names. ``names``: engine's name -> request's."""
    try:
        yield
    except InvalidRequest as error:
        raise invalid(error, names) from None


def check_not_failed(completions: Iterable[Completion]) -> None:
    """Raise the error of a request that failed; one that its caller aborted has not failed."""
    for completion in completions:
        reason = completion.finish_reason
        if reason is not None and reason.type == "abort" and reason.status_code != ABORTED_BY_CALLER:
            raise ApiError(reason.status_code or 500, reason.message or "the request failed", code="request_failed")
