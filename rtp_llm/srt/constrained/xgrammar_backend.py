"""Grammars by xgrammar, an optional library: JSON schemas, choices and GBNF. All other grammars are llguidance's.

It has no limits on its work: what compiles for long holds up grammars behind it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import xgrammar

from rtp_llm.srt.constrained.backend import GrammarError, Matcher
from rtp_llm.srt.constrained.llguidance_backend import MAX_ERROR_CHARS, LLGuidanceBackend
from rtp_llm.srt.constrained.xgrammar_schema import NO_SPACE, is_taken, kept_schema
from rtp_llm.srt.request_spec import GrammarSpec

MAX_SPACE = 40  # characters between JSON tokens, as in other grammars
NOT_ALLOWED = "the grammar does not allow the token"


class XGrammarMatcher:
    """See Matcher."""

    def __init__(self, inner: Any, backend: "XGrammarBackend") -> None:
        self.inner = inner
        self._backend = backend
        self._is_complete: bool | None = None  # None: not looked at since the last token
        self.error = ""

    def fork(self) -> Self:
        copy = type(self)(self.inner.fork(), self._backend)
        copy.error = self.error
        return copy

    def accept(self, token_id: int) -> bool:
        self._is_complete = None
        if not self.error and not self.inner.accept_token(token_id):
            self.error = NOT_ALLOWED
        return not self.error

    def forced_tokens(self) -> list[int]:
        if not self._backend.forces_tokens or self.error or self.inner.is_terminated():
            return []
        tokens: list[int] = self.inner.find_jump_forward_tokens()
        return tokens

    @property
    def is_complete(self) -> bool:
        if self._is_complete is None:
            self._is_complete = not self.error and self.inner.is_completed() and self._backend.is_at_end(self)
        return self._is_complete


class XGrammarBackend:
    """See GrammarBackend.

    Args:
        tokenizer, vocab_size, forces_tokens: see LLGuidanceBackend.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, forces_tokens: bool = False) -> None:
        self.forces_tokens = forces_tokens
        self._others = LLGuidanceBackend(tokenizer, vocab_size, forces_tokens)
        # One more than either knows: a token that is never drawn, to be the end where no other is.
        self._never_drawn = max(vocab_size, len(tokenizer), *tokenizer.get_vocab().values())
        self._num_words = self._never_drawn // 32 + 1
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=self._never_drawn + 1, stop_token_ids=[self._never_drawn]
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, spec: GrammarSpec, end_ids: Sequence[int]) -> Matcher:
        if not is_taken(spec):
            return self._others.compile(spec, end_ids)
        schema = kept_schema(spec) if spec.kind == "json_schema" else ""
        self._others.compile(spec, end_ids)  # refuses what cannot be kept by either, and what takes too much work
        try:
            compiled = self._compiled(spec, schema)
        except (RuntimeError, ValueError) as error:
            raise GrammarError(" ".join(str(error).split())[:MAX_ERROR_CHARS]) from None
        stops = [*end_ids, self._never_drawn]
        return XGrammarMatcher(xgrammar.GrammarMatcher(compiled, override_stop_tokens=stops), self)

    def token_bytes(self, token_id: int) -> bytes:
        return self._others.token_bytes(token_id)

    def fill(self, matchers: Sequence[Matcher], words: npt.NDArray[np.int32]) -> None:
        others = [(row, matcher) for row, matcher in enumerate(matchers) if not isinstance(matcher, XGrammarMatcher)]
        if others:
            masks = np.empty((len(others), words.shape[1]), dtype=np.int32)
            self._others.fill([matcher for _, matcher in others], masks)
            words[[row for row, _ in others]] = masks
        for row, matcher in enumerate(matchers):
            if isinstance(matcher, XGrammarMatcher):
                words[row] = self._mask(matcher)[: words.shape[1]]

    def is_at_end(self, matcher: XGrammarMatcher) -> bool:
        """Return whether nothing may follow but an end."""
        mask = self._mask(matcher)
        for token_id in matcher.inner.stop_token_ids:
            word, bit = divmod(token_id, 32)
            mask.view(np.uint32)[word] &= np.uint32(0xFFFFFFFF ^ 1 << bit)
        return not mask.any()

    def _mask(self, matcher: XGrammarMatcher) -> npt.NDArray[np.int32]:
        mask = np.full((1, self._num_words), -1, dtype=np.int32)
        if not matcher.error and not matcher.inner.is_terminated():
            matcher.inner.fill_next_token_bitmask(mask)
        word, bit = divmod(self._never_drawn, 32)
        mask.view(np.uint32)[0, word] &= np.uint32(0xFFFFFFFF ^ 1 << bit)
        row: npt.NDArray[np.int32] = mask[0]
        return row

    def _compiled(self, spec: GrammarSpec, schema: str) -> Any:
        if schema:
            return self._compiler.compile_json_schema(schema, strict_mode=False, **_space(spec.whitespace))
        if spec.kind == "choice":
            choices = " | ".join(map(_quoted, json.loads(spec.text)))
            return self._compiler.compile_grammar(f"root ::= {choices}")
        return self._compiler.compile_grammar(spec.text)


def _space(whitespace: str | None) -> Mapping[str, Any]:
    if whitespace == NO_SPACE:
        return {"any_whitespace": False, "separators": (",", ":")}
    return {"any_whitespace": True, "max_whitespace_cnt": MAX_SPACE}


def _quoted(text: str) -> str:
    """Return a text as it stands in GBNF."""
    return '"' + "".join(char if char.isalnum() or char == " " else f"\\U{ord(char):08x}" for char in text) + '"'
