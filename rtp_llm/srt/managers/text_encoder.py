"""Encode texts as transformers' tokenizer does, from any thread, without time spent on texts far too long."""

import copy
import logging
import threading
from typing import Any

from rtp_llm.srt.sampling_params import InvalidRequest

logger = logging.getLogger(__name__)

LONG_TEXT = 20_000  # characters; longer texts are long
MAX_TEXT = 2**22  # characters, or MAX_CHARS_PER_TOKEN for each token of a context that is longer
MAX_CHARS_PER_TOKEN = 8  # on average, in texts that are encoded at once
PIECE = 2**14  # characters


class TooManyTokens(Exception):
    """A text has more tokens than wanted."""


class TextEncoder:
    """Encodes one text at a time, since transformers sets the tokenizer's state before each. Long texts are encoded by
    a copy of the tokenizer, made for the first one, so that short texts do not wait for them.

    Args:
        tokenizer: of transformers.
        most_tokens: of a prompt.
    """

    def __init__(self, tokenizer: Any, most_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._copy: tuple[Any, threading.Lock] | None = None
        self._copying = threading.Lock()
        self._most_tokens = most_tokens

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Return all of a text's ids. Raise InvalidRequest for a text beyond MAX_TEXT."""
        most = max(MAX_TEXT, MAX_CHARS_PER_TOKEN * self._most_tokens)
        if len(text) > most:
            raise InvalidRequest(
                f"the text has {len(text)} characters; at most {most} are encoded at once: send it in parts", "prompt"
            )
        tokenizer, lock = (self._tokenizer, self._lock) if len(text) <= LONG_TEXT else self._for_long_texts()
        with lock:
            return _encode(tokenizer, text, add_special_tokens)

    def encode_input(
        self, text: str, pair: str | None, add_special_tokens: bool, max_tokens: int | None
    ) -> tuple[list[int], int | None]:
        """Return the ids of a text, or of a pair of texts, and where the second begins for a model with token types.

        Args:
            max_tokens: longer ones are cut, and keep their special tokens; of a pair, the longer text is cut.
        """
        tokenizer, lock = (self._tokenizer, self._lock) if len(text) <= LONG_TEXT else self._for_long_texts()
        cut = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
        with lock:
            encoding = tokenizer(
                text,
                pair,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=pair is not None,
                verbose=False,
                **cut,
            )
        types = encoding.get("token_type_ids") or []
        return encoding["input_ids"], types.index(1) if 1 in types else None

    def encode_inputs(self, texts: list[str], add_special_tokens: bool, max_tokens: int | None) -> list[list[int]]:
        """Return what ``encode_input`` returns of each, in a fraction of the time. No text may be long."""
        cut = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
        with self._lock:
            encoding = self._tokenizer(
                texts,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
                **cut,
            )
        ids: list[list[int]] = encoding["input_ids"]
        return ids

    def check_length(self, text: str) -> None:
        """Raise TooManyTokens for a text that has far more tokens than a prompt may.

        A text with many characters for each token that it may have is first counted piece by piece. Its pieces have
        other tokens at their ends than the whole, so twice as many are allowed.
        """
        if len(text) <= max(LONG_TEXT, MAX_CHARS_PER_TOKEN * self._most_tokens):
            return
        num_tokens = 0
        tokenizer, lock = self._for_long_texts()
        for start in range(0, min(len(text), MAX_TEXT), PIECE):
            with lock:
                num_tokens += len(_encode(tokenizer, text[start : start + PIECE], False))
            if num_tokens > 2 * self._most_tokens + 2 * (start // PIECE):
                raise TooManyTokens

    def _for_long_texts(self) -> tuple[Any, threading.Lock]:
        with self._copying:
            if self._copy is None:
                try:
                    self._copy = copy.deepcopy(self._tokenizer), threading.Lock()
                except Exception as error:  # a tokenizer's own code may not support copies
                    logger.warning("the tokenizer cannot be copied: long texts will keep short ones waiting: %s", error)
                    self._copy = self._tokenizer, self._lock
            return self._copy


def _encode(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    return encoding["input_ids"]
