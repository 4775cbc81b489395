"""A conversation: messages, the pieces of an answer, and the backend that generates it."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

Content = str | list[dict[str, Any]]
"""A text, or parts: images and a text, in the form of OpenAI's API."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, or of the thoughts before it."""

    text: str
    is_thought: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """An answer's finish reason and numbers of tokens; None: unknown."""

    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None


class ContextFull(Exception):
    """The conversation is too long; raised before the first piece."""


ChatBackend = Callable[[list[Message]], Generator[Piece | Usage, None, None]]
"""From messages to the pieces of an answer, then one Usage. Closing it ends the request. It may raise ContextFull,
InvalidRequest or ServerError."""


class Chat:
    """The turns so far. A turn is a message of the user and its answer."""

    def __init__(self, backend: ChatBackend, system: str | None = None) -> None:
        self._backend = backend
        self.system = system
        self.turns: list[tuple[Content, str]] = []

    def ask(self, content: Content, on_dropped: Callable[[int, str], None]) -> Generator[Piece | Usage, None, None]:
        """Yield the pieces of the answer to a message, then its Usage. The turn is kept, even if it is cut short.

        If the context is full, the oldest turns are dropped, one by one; ``on_dropped`` gets their number and why.

        Raises:
            ContextFull: the message is too long even without any turn before.
        """
        answer = ""
        try:
            for item in self._generate(content, on_dropped):
                if isinstance(item, Piece) and not item.is_thought:
                    answer += item.text
                yield item
        except (GeneratorExit, KeyboardInterrupt):
            if answer:
                self.turns.append((content, answer))
            raise
        self.turns.append((content, answer))

    def _generate(
        self, content: Content, on_dropped: Callable[[int, str], None]
    ) -> Generator[Piece | Usage, None, None]:
        num_dropped, why = 0, ""
        while True:
            with closing(self._backend(self._messages(self.turns[num_dropped:], content))) as items:
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
