"""The bytes of each token, of tokenizers whose files the grammar compiler cannot read."""

import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how vocabularies with byte fallback name a byte
_INCOMPLETE = "\ufffd"
_ANCHORS = ("a", "x", "1", ".", "0")  # texts of which one is a token: what follows it begins with its own space


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return a tokenizer's special tokens: text -> id."""
    added = tokenizer.added_tokens_decoder.items()
    ids = {token_id for token_id, token in added if token.special} | set(tokenizer.all_special_ids)
    return {tokenizer.convert_ids_to_tokens(token_id): token_id for token_id in sorted(ids)}


class TokenBytes:
    """A vocabulary as llguidance's TokenizerWrapper takes it.

    ``tokens[i]`` is what token i adds to a text within it. Of tokens that are parts of characters only those named
    ``<0x..>`` are known; others are empty, and never allowed.

    Args:
        tokenizer: of transformers.
        size: ids in all; those beyond the tokenizer's are empty.
    """

    def __init__(self, tokenizer: Any, size: int, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.special_token_ids = sorted({*special_tokens(tokenizer).values(), end_id})
        self.eos_token_id = end_id
        self.bos_token_id = None
        names = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
        anchor = self._anchor()
        before = self._decode(anchor)
        self.tokens = [self._bytes(i, name, anchor, before) for i, name in enumerate(names)]
        self.tokens += [b""] * (size - len(names))

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("texts only")  # llguidance tries bytes first, and takes note
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _bytes(self, token_id: int, name: str | None, anchor: list[int], before: str) -> bytes:
        if name is None:
            return b""
        if match := _BYTE.fullmatch(name):
            return bytes([int(match[1], 16)])
        text = self._decode([*anchor, token_id])
        return b"" if _INCOMPLETE in text or not text.startswith(before) else text[len(before) :].encode()

    def _anchor(self) -> list[int]:
        for text in _ANCHORS:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == 1 and _INCOMPLETE not in self._decode(ids):
                return ids
        return []

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
        )
        return text
