"""Log-probabilities in OpenAI's two formats."""

import codecs
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from rtp_llm.srt.entrypoints.openai.protocol import ChatLogprobs, CompletionLogprobs, TopLogprob
from rtp_llm.srt.managers.incremental_text import special_ids
from rtp_llm.srt.plan import TokenLogprob

LOWEST = -9999.0  # what OpenAI writes for minus infinity, which JSON does not have
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PROBE = "a"  # a text before a token, so that the token keeps its space


class TokenTexts:
    """Each token's own text and bytes, as they occur within a text, with a cache."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_ids = special_ids(tokenizer)
        self._probe: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        self._probe_text = self._decode([])
        self._cache: dict[int, tuple[str, list[int]]] = {}

    def text(self, token_id: int) -> str:
        return self._entry(token_id)[0]

    def utf8(self, token_id: int) -> list[int]:
        """Return the token's UTF-8, or the bytes that it adds to a character."""
        return self._entry(token_id)[1]

    def name(self, token_id: int) -> str:
        r"""Return the text, or ``bytes:\xe6\x9d`` for a part of a character, so that names of tokens differ."""
        text = self.text(token_id)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.utf8(token_id)) if "\ufffd" in text else text

    def _entry(self, token_id: int) -> tuple[str, list[int]]:
        entry = self._cache.get(token_id)
        if entry is None:
            text = self._decode([token_id]).removeprefix(self._probe_text)
            entry = self._cache[token_id] = text, list(self._raw_bytes(token_id, text))
        return entry

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            [*self._probe, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _raw_bytes(self, token_id: int, text: str) -> bytes:
        if "\ufffd" not in text:
            return text.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if match := BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(match[1])
        table = byte_characters()
        if all(character in table for character in piece):
            return bytes(table[character] for character in piece)
        return text.encode()


@cache
def byte_characters() -> dict[str, int]:
    """Return character -> byte, as in the vocabularies of byte-level BPE (Radford et al. 2019).

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def chat_logprobs(texts: TokenTexts, items: Sequence[TokenLogprob], num_top: int) -> ChatLogprobs:
    def entry(token_id: int, logprob: float) -> TopLogprob:
        return {"token": texts.text(token_id), "logprob": max(logprob, LOWEST), "bytes": texts.utf8(token_id)}

    return {
        "content": [
            {
                **entry(item.token_id, item.logprob),
                "top_logprobs": [entry(token_id, logprob) for logprob, token_id in item.top[:num_top]],
            }
            for item in items
        ],
        "refusal": None,
    }


class TextOffsets:
    """Where the tokens of a completion begin in its text, token by token, however they are grouped in chunks.

    A token begins after the characters that those before it complete. Tokens that share a character begin where it
    does; bytes that are no UTF-8 count as the replacement characters that the text has for them; a token left out of
    the text has no characters.
    """

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool) -> None:
        self._texts = texts
        self._skipped = texts.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def add_text(self, text: str) -> None:
        """Add text that is not made of these tokens: the echoed prompt."""
        self._num_chars += len(text)

    def add(self, token_id: int) -> int:
        """Add the next token; return its offset."""
        start = self._num_chars
        if token_id not in self._skipped:
            self._num_chars += len(self._utf8.decode(bytes(self._texts.utf8(token_id))))
        return start


def prompt_offsets(texts: TokenTexts, ids: Sequence[int], text: str) -> list[int]:
    """Return the offsets of a prompt's tokens in its text, in which special tokens may be missing."""
    offsets, end = [], 0
    for token_id in ids:
        start, end = find_token(text, end, texts.text(token_id))
        offsets.append(start)
    return offsets


def completion_logprobs(
    texts: TokenTexts, items: Sequence[TokenLogprob], offsets: Sequence[int], first_id: int | None = None
) -> CompletionLogprobs:
    """Return log-probabilities of the tokens ``items``, which begin at ``offsets`` in the choice's text.

    ``first_id``: the prompt's first token, at ``offsets[0]``, which has no log-probability; None: the prompt is not
    part of the text. ``top_logprobs`` hold the token itself too. Of tokens with equal texts the most probable stays.
    """
    result: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": list(offsets)}

    def add(token_id: int, logprob: float | None, top: dict[str, float] | None) -> None:
        result["tokens"].append(texts.name(token_id))
        result["token_logprobs"].append(logprob)
        result["top_logprobs"].append(top)

    if first_id is not None:
        add(first_id, None, None)
    for item in items:
        top: dict[str, float] = {}
        for logprob, token_id in item.top:
            top.setdefault(texts.name(token_id), max(logprob, LOWEST))
        top.setdefault(texts.name(item.token_id), max(item.logprob, LOWEST))
        add(item.token_id, max(item.logprob, LOWEST), top)
    return result


def find_token(text: str, start: int, token: str) -> tuple[int, int]:
    """Return ``[start, end)`` of a token in ``text``, from ``start`` or, after a character of several tokens, the next.

    A text's first token may have lost its space. A special token, or a part of a character, is not found:
    it is empty at ``start``.
    """
    for candidate in filter(None, (token, token.removeprefix(" "))):
        found = text.find(candidate, start, start + len(candidate) + 1)
        if found >= 0:
            return found, found + len(candidate)
    return start, start
