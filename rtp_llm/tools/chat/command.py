"""``rtp-llm chat``: a conversation in the terminal, with an engine in this process or an OpenAI-compatible server.

Answers go to stdout, everything else (thoughts, statistics, notices, errors) to stderr. ``Chat`` knows neither engine
nor server: it speaks through a ``Voice``.
"""

import argparse
import asyncio
import base64
import sys
import time
import unicodedata
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

import rtp_llm
from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.srt.configs.server_args import DEMO_MODEL, ServerArgs
from rtp_llm.srt.sampling_params import InvalidRequest, SamplingParams
from rtp_llm.tools.http_client import ServerError, api_url, served_models, stream_json

SERVER_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}  # OpenAI's names of sampling parameters
CONTEXT_WORDS = ("context_length", "context length", "maximum context")  # in a server's error, code or message
MIN_ROOM = 64  # tokens that an answer should have, or the oldest turns are dropped

HELP = """\
Type a message and press Enter. A line that ends with \\ goes on in the next; a message
between lines of \"\"\" may have any number of lines. Ctrl-C stops an answer, Ctrl-D ends.
  /system [TEXT]  set the system message, or remove it
  /image SOURCE   attach a picture, a file or URL, to the next message; without SOURCE: none
  /retry          answer the last message anew
  /reset          forget the conversation, but not the system message
  /help, /exit    (a message may begin with a slash if that is doubled: //)"""

PICTURES = ("JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF")

Content = str | list[dict[str, Any]]
"""A text, or parts: pictures and a text, as OpenAI's API has them."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, or of the thoughts before it."""

    text: str
    is_thought: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """How an answer ended, and its numbers of tokens; None: not told."""

    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None


class ContextFull(Exception):
    """The conversation is too long; said before the first piece."""


Voice = Callable[[list[Message]], Generator[Piece | Usage, None, None]]
"""Messages to the pieces of an answer, then one Usage. Closing it ends the request. May raise ContextFull,
InvalidRequest or ServerError."""

LoadingBar = Callable[[], AbstractContextManager[Callable[[int, int], None] | None]]


def run_chat(args: argparse.Namespace, sampling: dict[str, Any], loading_bar: LoadingBar) -> int:
    """Runs the command; returns the exit status. ``sampling`` are the parameters given on the command line."""
    SamplingParams.from_dict(sampling)  # a wrong flag is told before a model is loaded
    with _server_voice(args, sampling) if args.url else _engine_voice(args, sampling, loading_bar) as voice:
        return Terminal(Chat(voice, args.system)).run()


# Voices


@contextmanager
def _engine_voice(args: argparse.Namespace, sampling: dict[str, Any], loading_bar: LoadingBar) -> Iterator[Voice]:
    from rtp_llm.srt.chat.messages import MediaRules  # heavy, and not for --url
    from rtp_llm.srt.checkpoint import read_chat_template
    from rtp_llm.srt.conversation import NO_CHAT_TEMPLATE

    if args.model_path is None:
        args.model_path = DEMO_MODEL
    if args.api_key is not None:
        raise ServerArgsError("--api-key is for a server; give its --url too")
    server_args = ServerArgs.from_cli_args(args)
    if server_args.skip_tokenizer_init:
        raise InvalidRequest("chat works on text: it cannot run with --skip-tokenizer-init")
    tell_of_demo(server_args)
    with loading_bar() as on_progress:
        engine = rtp_llm.Engine(server_args=server_args, on_progress=on_progress)
    with engine:
        if engine.tokenizer is None:
            raise InvalidRequest(f"{server_args.model_path} has no tokenizer; name one with --tokenizer-path")
        template = read_chat_template(server_args, engine.model_config, engine.tokenizer)
        if template is None:
            raise InvalidRequest(NO_CHAT_TEMPLATE)
        kinds = frozenset({"image"} if engine.model_config.is_multimodal else ())
        media = MediaRules(kinds, server_args.media_limits)
        yield EngineVoice(engine, template, media, engine.model_config.generation_defaults | sampling)


def tell_of_demo(server_args: ServerArgs) -> None:
    """Says on stderr that the embedded model answers, if it does: nobody shall take it for a large one."""
    if server_args.is_demo:
        print("No model named: this is the embedded demo model, a toy. Your own: --model-path DIR", file=sys.stderr)


class EngineVoice:
    """Speaks through an engine in this process. Answers take what room the context has, unless told otherwise."""

    def __init__(self, engine: Any, template: Any, media: Any, sampling: dict[str, Any]) -> None:
        self._engine = engine
        self._template = template
        self._media = media
        self._sampling = sampling

    def __call__(self, messages: list[Message]) -> Generator[Piece | Usage, None, None]:
        prompt = self._template.prompt(messages, media=self._media)
        ids = self._engine.tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens, verbose=False)[
            "input_ids"
        ]
        media = {"image_data": prompt.image_data} if prompt.image_data else {}
        prompt_len = self._len_with_images(ids, prompt.image_data) if media else len(ids)
        ends = {name: [*self._sampling.get(name, ()), *getattr(prompt, name)] for name in ("stop", "stop_token_ids")}
        params = SamplingParams.from_dict(self._sampling | ends | {"max_new_tokens": self._max_new_tokens(prompt_len)})
        with closing(self._engine.generate(input_ids=ids, sampling_params=params, stream=True, **media)) as results:
            num_told = 0
            for result in results:
                yield Piece(result["text"][num_told:])
                num_told = len(result["text"])
        meta = result["meta_info"]
        reason = meta["finish_reason"]
        if reason["type"] == "abort":
            raise InvalidRequest(f"the request was ended: {reason['message']}")
        yield Usage(reason["type"], meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"])

    def _len_with_images(self, ids: list[int], image_data: list[Any]) -> int:
        """Tokens of the prompt with those of its pictures, whose number depends on their size."""
        from rtp_llm.srt.managers.tokenizer_manager import Prompt  # heavy, and not for --url

        prompt = Prompt(input_ids=ids, image_data=image_data)
        return len(asyncio.run(self._engine.tokenizer_manager.with_media(prompt)).input_ids)

    def _max_new_tokens(self, prompt_len: int) -> int:
        asked = self._sampling.get("max_new_tokens")
        limit = self._engine.info["max_req_len"]
        room = limit - prompt_len
        if room < (min(MIN_ROOM, limit // 2) if asked is None else asked):
            wanted = "an answer" if asked is None else f"an answer of {asked}"
            raise ContextFull(
                f"the conversation has {prompt_len} tokens, which leaves no room for {wanted}: the limit is {limit}"
            )
        return room if asked is None else asked


@contextmanager
def _server_voice(args: argparse.Namespace, sampling: dict[str, Any]) -> Iterator[Voice]:
    _refuse_engine_flags(args)
    base_url = api_url(args.url)
    yield ServerVoice(base_url, args.api_key, args.model_path or _first_model(base_url, args.api_key), sampling)


def _refuse_engine_flags(args: argparse.Namespace) -> None:
    """With ``--url`` nothing of this process's engine can be chosen; ``--model`` names one of the server's models."""
    for field in fields(ServerArgs):
        default = "warning" if field.name == "log_level" else field.default
        if field.name not in ("model_path", "api_key") and getattr(args, field.name, default) != default:
            flag = "--" + field.name.replace("_", "-")
            raise ServerArgsError(f"{flag} is for an engine in this process; with --url the server has its own")


def _first_model(base_url: str, api_key: str | None) -> str:
    models = served_models(base_url, api_key)
    if not models:
        raise ServerError(f"{base_url} serves no model")
    return models[0]["id"]


class ServerVoice:
    """Speaks through ``/v1/chat/completions`` of a server."""

    def __init__(self, base_url: str, api_key: str | None, model: str, sampling: dict[str, Any]) -> None:
        self._base_url = base_url
        self._api_key = api_key
        self._request = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **{SERVER_NAMES.get(name, name): value for name, value in sampling.items()},
        }

    def __call__(self, messages: list[Message]) -> Generator[Piece | Usage, None, None]:
        request = self._request | {"messages": messages}
        finish_reason = None
        usage: dict[str, Any] = {}
        try:
            with closing(stream_json(f"{self._base_url}/chat/completions", request, self._api_key)) as chunks:
                for chunk in chunks:
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or []:
                        yield from _pieces(choice.get("delta") or {})
                        finish_reason = choice.get("finish_reason") or finish_reason
        except ServerError as error:
            if error.status in (400, 413) and any(words in str(error).lower() for words in CONTEXT_WORDS):
                raise ContextFull(str(error)) from error
            raise
        if finish_reason is None:
            raise ServerError("the server ended the answer without saying why (no finish_reason)")
        details = usage.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens")
        yield Usage(finish_reason, usage.get("prompt_tokens"), usage.get("completion_tokens"), cached)


def _pieces(delta: dict[str, Any]) -> Iterator[Piece]:
    if thought := delta.get("reasoning_content") or delta.get("reasoning"):
        yield Piece(thought, is_thought=True)
    if text := delta.get("content"):
        yield Piece(text)


# The conversation


class Chat:
    """What was said so far. A turn is a message of the user and its answer."""

    def __init__(self, voice: Voice, system: str | None = None) -> None:
        self._voice = voice
        self.system = system
        self.turns: list[tuple[Content, str]] = []

    def ask(self, content: Content, on_dropped: Callable[[int, str], None]) -> Generator[Piece | Usage, None, None]:
        """The pieces of the answer to a message, then its Usage. What was said is remembered, even if it is cut short.

        Where the context is full, the oldest turns are forgotten, one by one; ``on_dropped`` gets their number and why.

        Raises:
            ContextFull: the message is too long even without any turn before.
        """
        answer = ""
        try:
            for item in self._speak(content, on_dropped):
                if isinstance(item, Piece) and not item.is_thought:
                    answer += item.text
                yield item
        except (GeneratorExit, KeyboardInterrupt):
            if answer:
                self.turns.append((content, answer))
            raise
        self.turns.append((content, answer))

    def _speak(self, content: Content, on_dropped: Callable[[int, str], None]) -> Generator[Piece | Usage, None, None]:
        num_dropped, why = 0, ""
        while True:
            with closing(self._voice(self._messages(self.turns[num_dropped:], content))) as items:
                try:
                    first = next(items)
                except ContextFull as error:
                    if num_dropped == len(self.turns):
                        raise
                    num_dropped, why = num_dropped + 1, str(error)
                    continue
                if num_dropped:
                    del self.turns[:num_dropped]
                    on_dropped(num_dropped, why)
                yield first
                yield from items
                return

    def _messages(self, turns: list[tuple[Content, str]], content: Content) -> list[Message]:
        messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answered in turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": content}]


def picture_part(source: str) -> dict[str, Any]:
    """The part of a message that shows a picture: a URL as it is, a file with its content.

    Raises:
        InvalidRequest: there is no such file, or it is no picture.
    """
    if source.startswith(("http://", "https://", "data:")):
        return {"type": "image_url", "image_url": {"url": source}}
    path = Path(source).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read the picture {source}: {error.strerror or error}") from None
    kind = picture_kind(content)
    if kind is None:
        raise InvalidRequest(f"{source} is no picture of a known kind ({', '.join(PICTURES)})")
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def picture_kind(content: bytes) -> str | None:
    """Which of PICTURES a file's first bytes announce."""
    marks = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"BM": "BMP"}
    marks |= {b"II*\0": "TIFF", b"MM\0*": "TIFF"}
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    return next((kind for mark, kind in marks.items() if content.startswith(mark)), None)


# The terminal


class Terminal:
    """Reads messages and commands from stdin until it ends. Works the same, without prompts, if that is no terminal."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._notices = Console(stderr=True, highlight=False, soft_wrap=True)
        self._interactive = sys.stdin.isatty()
        self._clean = sys.stdout.isatty()
        self._pictures: list[dict[str, Any]] = []  # parts of the next message
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self._notice(HELP),
            "/system": self._set_system,
            "/image": self._attach,
            "/reset": self._reset,
            "/retry": self._retry,
        }

    def run(self) -> int:
        if self._interactive:
            _enable_line_editing()
            self._notice("/help lists the commands")
        while True:
            try:
                text = self._read_message()
                if text is None or text.strip() in ("/exit", "/quit"):
                    return 0
                self._take(text)
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._notice("\n(Ctrl-D or /exit ends)")
            except (InvalidRequest, ServerError, ContextFull) as error:
                if not self._interactive:
                    raise
                self._notice(f"error: {error}", "red")

    def _take(self, text: str) -> None:
        name, _, argument = text.strip().partition(" ")
        if name in self._commands:
            self._commands[name](argument.strip())
        elif name.startswith("/") and name[1:].isalpha():
            raise InvalidRequest(f"unknown command {name}; /help lists them")
        elif text.strip():
            self._send(text[1:] if text.startswith("//") else text)

    def _send(self, text: str) -> None:
        """Asks, with the pictures; they stay attached if there is no answer."""
        content: Content = [*self._pictures, {"type": "text", "text": text}] if self._pictures else text
        try:
            self._answer(content)
        finally:
            if self._chat.turns and self._chat.turns[-1][0] is content:
                self._pictures.clear()

    def _attach(self, source: str) -> None:
        if not source:
            self._pictures.clear()
            self._notice("no pictures for the next message")
            return
        if len(source) > 1 and source[0] == source[-1] and source[0] in "'\"":  # as file managers write paths
            source = source[1:-1]
        self._pictures.append(picture_part(source))
        self._notice(f"{pictures(len(self._pictures))} for the next message")

    def _set_system(self, text: str) -> None:
        self._chat.system = text or None
        self._notice("system message set" if text else "no system message")

    def _reset(self, _: str) -> None:
        self._chat.turns.clear()
        self._pictures.clear()
        self._notice("conversation forgotten")

    def _retry(self, _: str) -> None:
        if not self._chat.turns:
            raise InvalidRequest("there is no answer yet to be tried anew")
        last = self._chat.turns.pop()
        try:
            self._answer(last[0])
        finally:
            if not self._chat.turns or self._chat.turns[-1][0] is not last[0]:  # there is no new answer
                self._chat.turns.append(last)

    def _answer(self, content: Content) -> None:
        """Writes an answer as it comes; Ctrl-C stops it."""
        start_s = time.perf_counter()
        first_s = None
        is_thinking = False
        items = self._chat.ask(content, self._tell_dropped)
        try:
            for item in items:
                if isinstance(item, Usage):
                    end_s = time.perf_counter()
                    self._write("\n")
                    self._notice(statistics(item, start_s, first_s or end_s, end_s))
                elif item.text:
                    first_s = first_s or time.perf_counter()
                    if is_thinking and not item.is_thought:
                        self._notice("")
                    is_thinking = item.is_thought
                    self._think(item.text) if is_thinking else self._write(item.text)
        except KeyboardInterrupt:
            items.close()
            if not self._interactive:
                raise
            self._write("\n")
            self._notice("(stopped)")
        except Exception:
            if first_s is not None:
                self._write("\n")
            raise

    def _write(self, text: str) -> None:
        sys.stdout.write(without_controls(text) if self._clean else text)
        sys.stdout.flush()

    def _think(self, text: str) -> None:
        text = without_controls(text) if self._notices.is_terminal else text
        self._notices.print(text, style="dim", end="", markup=False, emoji=False)

    def _tell_dropped(self, num_turns: int, why: str) -> None:
        turns = "the oldest turn was" if num_turns == 1 else f"the {num_turns} oldest turns were"
        self._notice(f"({turns} forgotten: {why})", "yellow")

    def _notice(self, text: str, style: str = "dim") -> None:
        self._notices.print(text, style=style, markup=False, emoji=False)

    def _read_message(self) -> str | None:
        """The next message, which may have several lines; None at the end of the input."""
        line = self._read_line(f"[{pictures(len(self._pictures))}] > " if self._pictures else "> ")
        if line is None:
            return None
        if line.lstrip().startswith('"""'):
            return self._read_quoted(line.lstrip()[3:])
        lines = []
        while line is not None and line.endswith("\\"):
            lines.append(line[:-1])
            line = self._read_line("... ")
        return "\n".join([*lines, line or ""])

    def _read_quoted(self, line: str | None) -> str:
        lines = []
        while line is not None and not line.rstrip().endswith('"""'):
            lines.append(line)
            line = self._read_line("... ")
        lines.append((line or "").rstrip().removesuffix('"""'))
        return "\n".join(lines).strip("\n")

    def _read_line(self, prompt: str) -> str | None:
        if self._interactive and sys.stdout.isatty():
            try:
                return input(prompt)
            except EOFError:
                self._write("\n")
                return None
        if self._interactive:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None


def pictures(number: int) -> str:
    return "1 picture" if number == 1 else f"{number} pictures"


def _enable_line_editing() -> None:
    with suppress(ImportError):  # Python was built without it
        import_module("readline")  # gives input() its editing and history


def without_controls(text: str) -> str:
    """Shows control characters, which might do things to the terminal, as U+FFFD; new lines and tabs stay."""
    return "".join("\ufffd" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text)


def statistics(usage: Usage, start_s: float, first_s: float, end_s: float) -> str:
    """Tokens per second are those of the tokens after the first, or of all if the first is the only one."""
    shown = [f"first after {first_s - start_s:.3f} s"]
    if usage.completion_tokens is not None:
        cached = "" if usage.cached_tokens is None else f" ({usage.cached_tokens} cached)"
        num_new = usage.completion_tokens
        after_first = num_new > 1 and end_s > first_s
        per_second = (num_new - 1) / (end_s - first_s) if after_first else num_new / max(end_s - start_s, 1e-9)
        shown = [f"prompt {usage.prompt_tokens}{cached} + {num_new} tokens", *shown, f"{per_second:.1f} tokens/s"]
    if usage.finish_reason == "length":
        shown.append("cut by the limit")
    return f"({', '.join(shown)})"
