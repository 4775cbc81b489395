"""The terminal: messages and commands from stdin, answers to stdout, everything else to stderr."""

import sys
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from rich.console import Console

from rtp_llm.srt.sampling_params import InvalidRequest
from rtp_llm.tools.chat.conversation import Chat, Content, ContextFull, Usage
from rtp_llm.tools.chat.images import image_count, image_part
from rtp_llm.tools.http_client import ServerError

HELP = """\
Type a message and press Enter. A line that ends with \\ goes on in the next; a message
between lines of \"\"\" may have any number of lines. Ctrl-C stops an answer, Ctrl-D ends.
  /system [TEXT]  set the system message, or remove it
  /image SOURCE   attach an image, a file or URL, to the next message; without SOURCE: none
  /retry          answer the last message anew
  /reset          forget the conversation, but not the system message
  /help, /exit    (a message may begin with a slash if that is doubled: //)"""


class Terminal:
    """Reads messages and commands from stdin until it ends; without prompts if that is not a terminal."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._notices = Console(stderr=True, highlight=False, soft_wrap=True)
        self._interactive = sys.stdin.isatty()
        self._clean = sys.stdout.isatty()
        self._images: list[dict[str, Any]] = []  # parts of the next message
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
        """Send a message with the attached images, which stay attached if there is no answer."""
        content: Content = [*self._images, {"type": "text", "text": text}] if self._images else text
        try:
            self._answer(content)
        finally:
            if self._chat.turns and self._chat.turns[-1][0] is content:
                self._images.clear()

    def _attach(self, source: str) -> None:
        if not source:
            self._images.clear()
            self._notice("no images for the next message")
            return
        if len(source) > 1 and source[0] == source[-1] and source[0] in "'\"":  # as file managers write paths
            source = source[1:-1]
        self._images.append(image_part(source))
        self._notice(f"{image_count(len(self._images))} for the next message")

    def _set_system(self, text: str) -> None:
        self._chat.system = text or None
        self._notice("system message set" if text else "no system message")

    def _reset(self, _: str) -> None:
        self._chat.turns.clear()
        self._images.clear()
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
        """Write an answer as it comes; Ctrl-C stops it."""
        start_s = time.perf_counter()
        first_s = None
        is_thinking = False
        items = self._chat.ask(content, self._notice_dropped)
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
                    self._write_thought(item.text) if is_thinking else self._write(item.text)
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

    def _write_thought(self, text: str) -> None:
        text = without_controls(text) if self._notices.is_terminal else text
        self._notices.print(text, style="dim", end="", markup=False, emoji=False)

    def _notice_dropped(self, num_turns: int, why: str) -> None:
        turns = "the oldest turn was" if num_turns == 1 else f"the {num_turns} oldest turns were"
        self._notice(f"({turns} forgotten: {why})", "yellow")

    def _notice(self, text: str, style: str = "dim") -> None:
        self._notices.print(text, style=style, markup=False, emoji=False)

    def _read_message(self) -> str | None:
        """Return the next message, which may have several lines; None at the end of the input."""
        line = self._read_line(f"[{image_count(len(self._images))}] > " if self._images else "> ")
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


def _enable_line_editing() -> None:
    with suppress(ImportError):  # missing in some builds of Python
        import_module("readline")  # gives input() its editing and history


def without_controls(text: str) -> str:
    """Replace control characters, which might affect the terminal, by U+FFFD; new lines and tabs stay."""
    return "".join("\ufffd" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text)


def statistics(usage: Usage, start_s: float, first_s: float, end_s: float) -> str:
    """Return the line of statistics. The rate is that of tokens after the first, or of all if there is one only."""
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
