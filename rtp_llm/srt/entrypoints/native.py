"""The server's own endpoints: /generate in the shape of SGLang, tokens, health, information, control."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Self

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import Field, model_validator
from starlette.responses import Response
from typing_extensions import TypedDict

from rtp_llm.srt.constrained.spec import asks_for_grammar
from rtp_llm.srt.entrypoints.access import check_admin
from rtp_llm.srt.entrypoints.asgi import JSON, EventStream, event, unless_disconnected
from rtp_llm.srt.entrypoints.errors import ApiError, error_event, unavailable
from rtp_llm.srt.entrypoints.frontend import LiveCall, completions_of, completions_with_media
from rtp_llm.srt.entrypoints.llama_cpp.infill import PlainEncoder
from rtp_llm.srt.entrypoints.neutral import GENERATE, SAMPLING_PARAMS, TOKENIZE, without_neutral
from rtp_llm.srt.entrypoints.openai.base import disconnected_response
from rtp_llm.srt.entrypoints.openai.logprobs import TokenTexts
from rtp_llm.srt.entrypoints.openai.protocol import Body, Message, Model, ModelList, Name, Salt, TokenIds
from rtp_llm.srt.entrypoints.serving import Serving, check_not_failed, options_of, request_names
from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.managers.pooled import PooledRequests
from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.version import __version__

PROBE_TIMEOUT_S = 20.0
CHARS_PER_SEQUENCE = 500  # encoding so many characters takes as long as handling a sequence
SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")
Media = str | dict[str, Any] | list[Any] | None


class GenerateBody(Body):
    """The body of /generate. For a list of prompts, each option is one for all or a list of as many."""

    unsupported = GENERATE

    @model_validator(mode="after")
    def _leave_out_neutral_params(self) -> Self:
        """Leave null and neutral values out of sampling parameters, too."""
        given = self.sampling_params
        if isinstance(given, list):
            where = [f"sampling_params[{i}]." for i in range(len(given))]
            self.sampling_params = [
                without_neutral(item, SAMPLING_PARAMS, place) for item, place in zip(given, where, strict=True)
            ]
        elif given is not None:
            self.sampling_params = without_neutral(given, SAMPLING_PARAMS, "sampling_params.")
        return self

    text: str | list[str] | None = Field(None, description="the prompt, or a list of prompts")
    input_ids: TokenIds | list[TokenIds] | None = Field(None, description="instead of text: ids, or lists of them")
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = Field(
        None, description="max_new_tokens (128), temperature (1.0), top_p, top_k, min_p, stop, n, seed, ..."
    )
    stream: bool = Field(False, description="server-sent events, each with all of a completion so far")
    rid: Name | list[Name] | None = Field(None, description="the request's name, for /abort_request")
    return_logprob: bool | list[bool] = Field(False, description="log-probabilities, in meta_info")
    logprob_start_len: int | list[int] | None = Field(None, description="prompt position to begin with; -1: none")
    top_logprobs_num: int | list[int] | None = Field(None, description="alternatives per position")
    token_ids_logprob: TokenIds | list[TokenIds] | None = Field(None, description="ids wanted at every position")
    return_text_in_logprobs: bool = Field(False, description="logprob entries carry their token's text")
    cache_salt: Salt | list[Salt] | None = Field(None, description="share cached prefixes only with equal salts")
    priority: int | list[int] | None = Field(None, description="lower is earlier; with --schedule-policy priority")
    image_data: Media = Field(None, description="what image placeholders stand for: URLs, data: URIs, base64, paths")
    video_data: Media = Field(None, description="what video placeholders stand for")
    audio_data: Media = Field(None, description="what audio placeholders stand for")


class TokenizeBody(Body):
    """The body of /tokenize: one of ``prompt``, ``text`` (the same), ``content`` (llama.cpp's) and ``messages``."""

    unsupported = TOKENIZE

    model: str | None = None
    prompt: str | None = None
    text: str | None = None
    content: str | None = Field(None, description="llama.cpp's: a text, whose special tokens are not added by default")
    messages: list[Message] | None = None
    add_special_tokens: bool | None = Field(None, description="unset: true for prompt and text, otherwise false")
    add_special: bool | None = Field(None, description="llama.cpp's name of add_special_tokens")
    parse_special: bool | None = Field(None, description="false: names of special tokens in a text are text")
    with_pieces: bool | None = Field(None, description="tokens are objects of an id and its text, or its bytes")
    add_generation_prompt: bool = Field(True, description="with messages: begin the assistant's turn")
    continue_final_message: bool = Field(False, description="with messages: go on with the last one")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="with messages: variables of the template")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("prompt", "text", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            shown = " and ".join(given) or "none"
            raise InvalidRequest(
                f"give one of prompt, text, content and messages, not {shown}", given[-1] if given else "prompt"
            )
        if self.parse_special is False and (self.messages is not None or self.adds_special_tokens):
            raise InvalidRequest(
                "parse_special can be false only for a text to which no special tokens are added", "parse_special"
            )
        if None not in (self.add_special, self.add_special_tokens):
            raise InvalidRequest("add_special is another name of add_special_tokens: give one", "add_special")
        return self

    @property
    def adds_special_tokens(self) -> bool | None:
        """Whether the tokenizer's own tokens are put around the text; None: as the chat template has it."""
        given = self.add_special if self.add_special_tokens is None else self.add_special_tokens
        if given is None and self.messages is None:
            return self.content is None
        return given


class Piece(TypedDict):
    id: int
    piece: str | list[int]


class Tokens(TypedDict):
    tokens: list[int] | list[Piece]
    count: int
    max_model_len: int


class DetokenizeBody(Body):
    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool = Field(True, description="leave special tokens out of the text")


class Text(TypedDict):
    """The text, three times: under the names of SGLang, vLLM and llama.cpp."""

    text: str
    prompt: str
    content: str


class AbortBody(Body):
    rid: str | None = Field(None, min_length=1, description="the request to end")
    abort_all: bool = Field(False, description="end all requests")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.rid is None) != self.abort_all:
            raise InvalidRequest("give either rid or abort_all=true", "rid")
        return self


class Confirmation(TypedDict):
    success: bool
    message: str


class Version(TypedDict):
    version: str


class NativeEndpoints:
    def __init__(self, serving: Serving, registry: CollectorRegistry) -> None:
        self._serving = serving
        self._registry = registry
        self._token_texts: TokenTexts | None = None

    async def generate(self, body: GenerateBody, request: Request) -> Response:
        """Generate for a prompt, or for each of a list. The answer is ``{text, output_ids, meta_info}``, or a list."""
        num_sequences = _num_sequences(body)
        with self._serving.admission(num_sequences, "text" if body.input_ids is None else "input_ids"):
            prepared = await self._load_completions(body, request)
            if prepared is None:
                return disconnected_response()
            call = self._serving.start(*prepared)
        if body.stream:
            return EventStream(call, self._events(call))
        with call:
            if not await unless_disconnected(request.receive, call.wait()):
                return disconnected_response()
        if not call.many:
            check_not_failed(call.completions)
        return JSON(call.results())

    async def _load_completions(self, body: GenerateBody, request: Request) -> tuple[list[Completion], bool] | None:
        """Return the completions, and whether the answer is a list; None if the client has disconnected."""
        options = {**options_of(body), "sampling_params": body.sampling_params}
        manager = self._serving.manager
        num_chars = len(body.text) if isinstance(body.text, str) else sum(map(len, body.text or ()))
        with request_names({"prompt": "text"} if body.input_ids is None else {}):
            if body.image_data or body.video_data or body.audio_data:
                loading = completions_with_media(manager, body.text, body.input_ids, options)
                return await unless_disconnected(request.receive, loading)
            work = partial(completions_of, manager, body.text, body.input_ids, options)
            num_chars += CHARS_PER_SEQUENCE * _num_sequences(body)
            return await self._serving.off_loop(num_chars, work, asks_for_grammar(body.sampling_params))

    async def _events(self, call: LiveCall) -> AsyncGenerator[bytes, None]:
        async with error_event() as failure:
            async for changed in call.changes():
                for i in changed:
                    yield event(call.result(i))
        if failure.body is not None:
            yield event(failure.body)

    async def tokenize(self, body: TokenizeBody, request: Request) -> Response:
        """Return the token ids of a text, or of a conversation in the chat template's form."""
        serving = self._serving
        serving.check_model(body.model)
        serving.check_tokenizer()
        if body.messages is None:
            ids = await self._text_ids(body)
        else:
            chat = await serving.render(
                [message.model_dump(exclude_none=True) for message in body.messages],
                add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
                continue_final_message=body.continue_final_message,
                variables=body.chat_template_kwargs,
            )
            if body.adds_special_tokens is not None:
                chat = replace(chat, add_special_tokens=body.adds_special_tokens)
            encoded = await unless_disconnected(request.receive, serving.encode_chat(chat))
            if encoded is None:
                return disconnected_response()
            ids = encoded.input_ids
        tokens = await serving.off_loop(4 * len(ids), partial(self._pieces, ids)) if body.with_pieces else ids
        return JSON(Tokens(tokens=tokens, count=len(ids), max_model_len=serving.manager.context_length))

    async def _text_ids(self, body: TokenizeBody) -> list[int]:
        text = next(text for text in (body.prompt, body.text, body.content) if text is not None)
        if body.parse_special is not False:
            return await self._serving.encode(text, body.adds_special_tokens is not False, is_prompt=False)
        manager = self._serving.manager
        encode = PlainEncoder(
            manager.tokenizer, lambda part: manager.encode(part, add_special_tokens=False, is_prompt=False)
        )
        return await self._serving.off_loop(len(text), partial(encode, text))

    def _pieces(self, ids: list[int]) -> list[Piece]:
        """Return each token with its text; one that is a part of a character with its bytes."""
        if self._token_texts is None:
            self._token_texts = TokenTexts(self._serving.manager.tokenizer)
        texts = self._token_texts
        return [{"id": i, "piece": texts.utf8(i) if "\ufffd" in texts.text(i) else texts.text(i)} for i in ids]

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """Return the text of token ids."""
        self._serving.check_model(body.model)
        self._serving.check_tokenizer()
        work = partial(self._serving.manager.decode, body.tokens, body.skip_special_tokens)
        text = await self._serving.off_loop(4 * len(body.tokens), work)
        return JSON(Text(text=text, prompt=text, content=text))

    async def models(self) -> Response:
        """Return the served model, once for each of its names."""
        names = self._serving.args.model_names
        return JSON(ModelList(object="list", data=[self._model(name) for name in names]))

    async def model(self, model: str) -> Response:
        """Return the model of this name."""
        self._serving.check_model(model)
        return JSON(self._model(model))

    def _model(self, name: str) -> Model:
        serving = self._serving
        return {
            "id": name,
            "object": "model",
            "created": serving.created,
            "owned_by": "rtp-llm",
            "root": serving.args.model_path,
            "max_model_len": serving.manager.context_length,
        }

    async def health(self) -> Response:
        """Answer 200 while requests are taken, 503 while the core is starting or the server is ending."""
        if not self._serving.core.is_ready:
            raise unavailable("the engine core is starting", "not_ready")
        return JSON({"status": "ok"})

    async def health_generate(self) -> Response:
        """Answer as /health does, after generating one token, or making a pooled output if the model makes no text."""
        prompt_ids, outputs = [self._serving.model_config.bos_token_id or 0], self._serving.manager.outputs
        if outputs.generates:
            params = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
            completions, _ = completions_of(self._serving.manager, None, prompt_ids, {"sampling_params": params})
        else:
            requests = PooledRequests(self._serving.manager)
            completions, _ = requests.completions(outputs.names[0], None, prompt_ids, {})
        with self._serving.admission(1, "n"):
            call = self._serving.start(completions)
        with call:
            try:
                await asyncio.wait_for(call.wait(), PROBE_TIMEOUT_S)
            except TimeoutError:
                raise unavailable(f"no token came within {PROBE_TIMEOUT_S:.0f} s", "not_healthy") from None
        check_not_failed(completions)
        return JSON({"status": "ok"})

    async def model_info(self) -> Response:
        """Return the model's architecture and limits."""
        args, config = self._serving.args, self._serving.model_config
        return JSON(
            {
                "model_path": args.model_path,
                "tokenizer_path": args.tokenizer_path or args.model_path,
                "served_model_name": self._serving.model_name,
                "is_generation": self._serving.manager.outputs.generates,
                "tasks": self._serving.manager.outputs.names,
                "architectures": config.architectures,
                "dtype": config.dtype,
                "context_length": config.context_length,
                "vocab_size": config.vocab_size,
                "end_tokens": [token.to_dict() for token in self._serving.manager.end_tokens],
                "has_chat_template": self._serving.template is not None,
                "sampling_defaults": self._serving.sampling_defaults,
            }
        )

    async def server_info(self) -> Response:
        """Return the server's options, what was derived from model and machine, and its current state."""
        core = self._serving.core
        options = asdict(self._serving.args)
        options |= {name: "***" for name in SECRETS if options[name] is not None}
        return JSON({**options, "version": __version__, **asdict(core.info), "stats": asdict(core.stats)})

    async def version(self) -> Response:
        """Return the server's version."""
        return JSON(Version(version=__version__))

    async def flush_cache(self) -> Response:
        """Empty the prefix cache, if no request runs: 400 otherwise."""
        result = await asyncio.wrap_future(self._serving.core.client.start_flush())
        if not result:
            raise ApiError(400, result.message, code="not_flushed")
        return JSON(Confirmation(success=True, message="the prefix cache is empty"))

    async def abort_request(self, body: AbortBody, request: Request) -> Response:
        """Abort a running request or, with an admin key, all. Callers get the output so far, with finish reason
        ``abort``."""
        refused = check_admin(request.scope) if body.abort_all else None
        if refused is not None:
            raise refused
        self._serving.core.client.abort(body.rid)
        return JSON(Confirmation(success=True, message="aborted, if it was running"))

    async def metrics(self) -> Response:
        """Return Prometheus metrics."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


def _num_sequences(body: GenerateBody) -> int:
    """Return prompts times ``n``; the value of ``n`` is checked later."""
    prompts = body.text if body.input_ids is None else body.input_ids
    is_batch = isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int))
    num_prompts = len(prompts or ()) if is_batch else 1
    params = body.sampling_params
    if isinstance(params, list):
        return sum(_n(item) for item in params)
    return num_prompts * _n(params or {})


def _n(params: dict[str, Any]) -> int:
    n = params.get("n", 1)
    return n if isinstance(n, int) and n > 0 else 1
