"""How models write their thinking and their calls, as data; ``tables.py`` has those that are built in.

In every format, white space may stand between the parts of a call.
"""

from dataclasses import dataclass
from typing import NamedTuple

Span = tuple[str, str]  # what opens it, what closes it


@dataclass(frozen=True, slots=True)
class Thinking:
    """Thinking between two tags.

    Args:
        open, close: the tags. An opening tag that the prompt ends with counts, too.
        is_implied: the model thinks first without an opening tag, whatever the prompt ends with.
        anywhere: it may begin within the answer; otherwise only at its beginning and after calls.
        ends_at_call: a call within it ends it.
        end: how a model ends it, of its own accord; empty: with the closing tag alone.
    """

    open: str
    close: str
    is_implied: bool = False
    anywhere: bool = False
    ends_at_call: bool = False
    end: str = ""


@dataclass(frozen=True, slots=True)
class JsonCall:
    """``{"name": "f", "arguments": {...}}``.

    Args:
        names, arguments: the members' names, any of each.
        name_is_key: ``{"f": {...}}`` instead.
        id_first: a member with the call's number, which may stand first.
    """

    names: tuple[str, ...] = ("name",)
    arguments: tuple[str, ...] = ("arguments", "parameters")
    name_is_key: bool = False
    id_first: str = ""


@dataclass(frozen=True, slots=True)
class HeadCall:
    """A name between literals, and then the JSON of the arguments: ``function<sep>f\\n```json\\n{...}\\n``` ``.

    Args:
        before_name, after_name: the literals, in order.
        after_arguments: likewise.
        optional: those of them that may be missing.
        id_before_name: what ends a call's id, which then stands first.
        id_after_name: what opens a call's id after the name.
        name_is_id: the name is written ``functions.f:0``, and all of this is the call's id.
    """

    before_name: tuple[str, ...] = ()
    after_name: tuple[str, ...] = ()
    after_arguments: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    id_before_name: str = ""
    id_after_name: str = ""
    name_is_id: bool = False


class KeyEnd(NamedTuple):
    """What stands between an argument's name and its value: ``text``.

    ``is_string``: the value is a string (None: by the schema); ``closing``: the value ends with this and the usual tag.
    """

    text: str
    is_string: bool | None = None
    closing: str = ""


@dataclass(frozen=True, slots=True)
class TagCall:
    """A name and a tag for each argument: ``<function=f><parameter=a>1</parameter></function>``.

    Strings stand as they are, other values as JSON; the tool's schema tells them apart, unless the tag does.

    Args:
        name: what stands before and after the name.
        key: what stands before each argument's name.
        key_ends: what may stand after it.
        value: what stands before and after the value.
        trims_lines: a new line after the opening tag, and one before the closing tag, are not part of the value.
        end: what ends the call.
    """

    name: Span
    key: str
    key_ends: tuple[KeyEnd, ...]
    value: Span
    trims_lines: bool = False
    end: str = ""


@dataclass(frozen=True, slots=True)
class PythonCall:
    """``f(a=1, b="x")``, with Python's literals or JSON's."""


@dataclass(frozen=True, slots=True)
class BareKeysCall:
    """``call:f{a:1,b:"x"}`` with bare keys, and strings between ``quote``, which knows no escapes (Gemma 4)."""

    prefix: str
    quote: str


Body = JsonCall | HeadCall | TagCall | PythonCall | BareKeysCall


@dataclass(frozen=True, slots=True)
class Calls:
    """How calls stand in an answer.

    Args:
        body: the call itself; of several, the first that can begin with what is there: JSON begins with ``{``.
        section: what stands before and after all calls.
        section_is_optional: calls may come without it.
        wrap: what stands before and after each call. A closing one that is missing is forgiven.
        wraps: more of these.
        is_list: calls may be the items of a list, ``[call, call]``.
        separator: what may stand between calls in place of white space.
        bare: with what a message that begins with a call begins, where nothing else marks it. Such a call must name
            one of the request's tools.
        id_chars: number of letters and digits of an id, where templates ask for it; 0: any id will do.
    """

    body: tuple[Body, ...]
    section: Span = ("", "")
    section_is_optional: bool = False
    wrap: Span = ("", "")
    wraps: tuple[Span, ...] = ()
    is_list: bool = False
    separator: str = ""
    bare: tuple[str, ...] = ()
    id_chars: int = 0

    @property
    def wrapped_in(self) -> dict[str, str]:
        """What stands before each call, and what then stands after it."""
        return {opening: closing for opening, closing in (self.wrap, *self.wraps) if opening}

    @property
    def ends(self) -> tuple[str, ...]:
        """The texts that can stand after a call."""
        return tuple(dict.fromkeys(filter(None, (*self.wrapped_in.values(), self.section[1]))))

    @property
    def triggers(self) -> tuple[str, ...]:
        """The texts with which calls begin anywhere in an answer."""
        opens = [self.section[0]]
        if not self.section[0] or self.section_is_optional:
            opens += self.wrapped_in
        return tuple(dict.fromkeys(filter(None, opens)))


@dataclass(frozen=True, slots=True)
class Channels:
    """Messages with headers, ``<|start|>assistant<|channel|>analysis<|message|>...<|end|>`` (OpenAI's harmony).

    Args:
        start, channel, message: the tags of a header: before the role, before the channel, and the last.
        ends: what ends a message.
        thinking: channels of thinking; all others are content, unless they are to a function.
        function: what stands before a function's name as the recipient.
    """

    start: str
    channel: str
    message: str
    ends: tuple[str, ...]
    thinking: tuple[str, ...]
    function: str = "functions."


@dataclass(frozen=True, slots=True)
class Format:
    """How a model answers.

    Args:
        hidden: tags around the content that are not part of it.
        channels: all else is unset: messages with headers say what is what.
    """

    thinking: Thinking | None = None
    calls: Calls | None = None
    hidden: tuple[str, ...] = ()
    channels: Channels | None = None

    @property
    def has_calls(self) -> bool:
        return self.calls is not None or self.channels is not None

    @property
    def is_plain(self) -> bool:
        """Whether all of a text is content."""
        return self == Format()

    @property
    def tags(self) -> tuple[str, ...]:
        """All texts of the format: special tokens that are part of one must be in the text that is parsed."""
        return tuple(dict.fromkeys(filter(None, _texts(self))))


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, tuple):
        return [text for item in value for text in _texts(item)]
    slots = getattr(type(value), "__slots__", ())
    return [text for name in slots for text in _texts(getattr(value, name))]
