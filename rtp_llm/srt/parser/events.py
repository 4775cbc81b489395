"""What an answer's text is made of, in the order in which it comes: content, reasoning and tool calls.

A call is ``CallBegin``, any number of ``Arguments`` whose texts together are the JSON text of its arguments, and
``CallEnd``; nothing else comes between. A call without ``CallEnd`` was cut by the end of the text.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of the function ``name``. ``index`` counts the answer's calls; ``id`` is unique among them."""

    index: int
    name: str
    id: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next part of the call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is complete."""

    index: int


Event = Content | Reasoning | CallBegin | Arguments | CallEnd


def merged(events: list[Event]) -> list[Event]:
    """Return the events with neighbouring texts of one kind joined."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and last.index == event.index:
            joined[-1] = Arguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined
