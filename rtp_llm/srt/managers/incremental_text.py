"""From token ids to text, piece by piece, with a tokenizer's own decoder."""

from collections.abc import Sequence
from copy import copy
from typing import Any

INCOMPLETE = "\ufffd"  # decoders write it for bytes that are not, or not yet, a character
CONTEXT_TOKENS = 6  # trailing ids decoded along with new ones, since the space before a token depends on what precedes
MAX_CHAR_TOKENS = 4  # a character has at most four bytes, hence tokens
MAX_HELD_TOKENS = 8  # bytes of more tokens will never become a character
MAX_WINDOW_TOKENS = 24
# Modules of transformers whose tokenizer methods do nothing but call their backend.
_STOCK_METHODS = {"decode": "tokenization_utils_base", "_decode": "tokenization_utils_tokenizers"}


class Decoder:
    """Ids to text with one tokenizer, without the clean-ups that make a text depend on what follows it.

    ``skipped`` are the ids that never give text: the special tokens, with ``skip_special_tokens``, but for those that
    are part of one of the texts ``kept``.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool, kept: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._backend = plain_backend(tokenizer)
        self.skipped = special_ids(tokenizer) if skip_special_tokens else frozenset()
        if kept:
            texts = {token_id: tokenizer.convert_ids_to_tokens(token_id) for token_id in self.skipped}
            self.skipped -= {token_id for token_id, text in texts.items() if any(text in item for item in kept)}

    def __call__(self, ids: Sequence[int]) -> str:
        kept = [token_id for token_id in ids if token_id not in self.skipped]
        if self._backend is not None:
            return self._backend.decode(kept, skip_special_tokens=False)
        return self._tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
        )


def plain_backend(tokenizer: Any) -> Any:
    """Return the tokenizers library's tokenizer behind ``tokenizer``, if transformers decodes by nothing but calling it
    (at three times its cost); None for other kinds of tokenizers, and for classes that decode in their own way.
    """
    for name, module in _STOCK_METHODS.items():
        method = getattr(type(tokenizer), name, None)
        if getattr(method, "__module__", None) != f"transformers.{module}":
            return None
    return tokenizer.backend_tokenizer


def special_ids(tokenizer: Any) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}


class IncrementalText:
    """The text that generated ids add to their prompt's text, piece by piece; the pieces concatenate to it.

    A window of recent ids, at first the prompt's last few, is decoded at every step:

        window ids  | context, clean: given out whole | pending                         |
        window text | seen                            | given out if whole | U+FFFD...  |

    A point is clean where the window's text ends in a whole character. Trailing U+FFFD are held until the bytes that
    are missing arrive, or cannot arrive any more. Byte-fallback decoders show a whole run of bytes as
    U+FFFD as soon as one of them does not fit: characters that were given out vanish from the window's text, and come
    back or not.
    """

    def __init__(self, decode: Decoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window, self._clean, self._seen = _prompt_context(decode, prompt_ids)
        self._partial = False  # text was given out past the clean point
        self._num_held = 0  # ids since anything was given out

    @property
    def window(self) -> Sequence[int]:
        """The recent ids that the text of the next one may depend on."""
        return self._window

    @property
    def is_holding(self) -> bool:
        """Whether ids at the end may belong to a character that is not whole yet."""
        return len(self._window) > self._clean

    def held(self) -> str:
        """Return what ``flush`` would return now."""
        return self._rest(len(self._window)) if self.is_holding else ""

    def fork(self, decode: Decoder) -> "IncrementalText":
        """Return a copy that goes on with another decoder, which gives the same text for the ids so far."""
        twin = copy(self)
        twin._decode, twin._window = decode, list(self._window)
        return twin

    def push(self, token_id: int) -> str:
        """Take a generated id; return the text that is certain now: of this id, of earlier ones too, or none."""
        if token_id in self._decode.skipped:
            return ""
        self._window.append(token_id)
        return self._advance(self._decode(self._window))

    def flush(self) -> str:
        """Return the text that was held back, since no id will follow. Idempotent."""
        piece = self._rest(len(self._window))
        self._restart([])
        return piece

    def _advance(self, text: str) -> str:
        base = common_prefix(self._seen, text)
        whole = text.rstrip(INCOMPLETE)
        vanished = not self._partial and self._seen[len(base) :].strip(INCOMPLETE) != ""
        if len(whole) > len(base):
            return self._apart(0) if vanished else self._give(base, whole, text)
        if text == whole == self._seen != "":
            self._window.pop()  # ids without text would leave a window without context
            return ""
        return self._hold()

    def _give(self, base: str, whole: str, text: str) -> str:
        self._seen = whole
        self._num_held = 0
        self._partial = whole != text
        if not self._partial:
            self._clean = len(self._window)
            self._trim()
        return whole[len(base) :]

    def _trim(self) -> None:
        """Shorten the context to a few ids whose text does not depend on what precedes them."""
        if len(self._window) <= MAX_WINDOW_TOKENS:
            return
        for size in range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_CHAR_TOKENS):
            tail = self._window[-size:]
            text = self._decode(tail)
            if text and self._seen.endswith(text):
                self._window, self._seen, self._clean = tail, text, size
                return

    def _hold(self) -> str:
        self._num_held += 1
        pending = self._window[self._clean :]
        if not self._partial:
            for start in range(max(1, len(pending) - MAX_CHAR_TOKENS), len(pending)):
                tail = self._decode(pending[start:])
                if tail and INCOMPLETE not in tail:
                    return self._apart(start)
        return self._release() if self._num_held >= MAX_HELD_TOKENS else ""

    def _apart(self, start: int) -> str:
        """Decode pending ids from ``start`` on apart from the bytes before them, with which they give no character."""
        pending = self._window[self._clean :]
        head = self._decode(pending[:start]) if start else ""
        self._restart(pending[start:])
        return head + self._advance(self._decode(self._window))

    def _release(self) -> str:
        """Release held bytes as U+FFFD, but for the last few, which may still begin a character."""
        keep = MAX_CHAR_TOKENS - 1
        piece = self._rest(len(self._window) - keep)
        self._restart(self._window[-keep:])
        self._num_held = keep
        return piece

    def _rest(self, end: int) -> str:
        """Return what the window's ids up to ``end`` add to the text given out, U+FFFD included."""
        text = self._decode(self._window[:end])
        base = common_prefix(self._seen, text)
        if self._seen[len(base) :].strip(INCOMPLETE) and not self._partial:
            return self._decode(self._window[self._clean : end])
        return text[len(base) :]

    def _restart(self, window: list[int]) -> None:
        self._window = window
        self._seen = ""
        self._clean = 0
        self._partial = False
        self._num_held = 0


def common_prefix(a: str, b: str) -> str:
    if b.startswith(a):
        return a
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))]


def _prompt_context(decode: Decoder, prompt_ids: Sequence[int]) -> tuple[list[int], int, str]:
    """Return the prompt's last ids with text, from a character's start; how many are whole characters; their text.

    A prompt may end within a character, which then belongs to the completion if it is completed there.
    """
    recent: list[int] = []
    for token_id in reversed(prompt_ids):
        if len(recent) == CONTEXT_TOKENS + 2 * MAX_CHAR_TOKENS:
            break
        if token_id not in decode.skipped:
            recent.insert(0, token_id)
    for end in range(len(recent), max(0, len(recent) - MAX_CHAR_TOKENS), -1):
        for start in range(end - CONTEXT_TOKENS, end - CONTEXT_TOKENS - MAX_CHAR_TOKENS, -1):
            window = recent[max(0, start) :]
            clean = end - max(0, start)
            text = decode(window[:clean])
            if INCOMPLETE not in text:
                with_rest = decode(window)
                return window, clean, with_rest if with_rest.startswith(text) else text
    window = recent[-CONTEXT_TOKENS:]
    return window, len(window), decode(window) if window else ""
