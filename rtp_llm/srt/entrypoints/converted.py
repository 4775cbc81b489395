"""Messages made from those of another dialect, and where each comes from."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rtp_llm.srt.sampling_params import InvalidRequest

PLACE = re.compile(r"\bmessages\[(\d+)\](?:\.content\[(\d+)\])?")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a converted message comes from in the request: the whole, and each of its parts."""

    whole: str
    parts: Sequence[str] = ()


@dataclass(slots=True)
class Conversation:
    """Converted messages, each with its place."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def add(self, message: dict[str, Any], place: Place) -> None:
        self.messages.append(message)
        self.places.append(place)

    @contextmanager
    def naming_places(self) -> Iterator[None]:
        """Name the request's own places in an InvalidRequest that names the converted messages."""
        try:
            yield
        except InvalidRequest as error:
            raise type(error)(PLACE.sub(self._place, str(error)), error.param) from None

    def _place(self, match: re.Match[str]) -> str:
        i, part = int(match[1]), match[2]
        if i >= len(self.places):
            return match[0]
        place = self.places[i]
        if part is None:
            return place.whole
        return place.parts[int(part)] if int(part) < len(place.parts) else f"{place.whole}.content[{part}]"
