"""Grammars by llguidance: an Earley parser over derivatives of regular expressions, with limits on all its work."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Self, cast

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from rtp_llm.srt.constrained.backend import GrammarError, Matcher
from rtp_llm.srt.constrained.json_schema import check_schema
from rtp_llm.srt.constrained.structural_tag import tag_grammar
from rtp_llm.srt.constrained.token_bytes import TokenBytes, special_tokens
from rtp_llm.srt.parser.rules import WHITESPACE
from rtp_llm.srt.parser.schemas import without_free_formats
from rtp_llm.srt.request_spec import GrammarSpec

MAX_ERROR_CHARS = 400
_NEVER_DRAWN = "<|rtp_llm: no end|>"  # stands for the end of a text where no token does
# How its messages begin.
_NO_TEXT, _UNKNOWN_KEYWORDS, _ONE_OF = "NoExtension", "Unimplemented keys: ", "oneOf constraints"
# About a tenth of a second to compile, a few milliseconds for a mask at the most.
_LIMITS = LLParserLimits(
    verbose_errors=False,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_grammar_size=500_000,
    max_lexer_states=50_000,  # they stay with a compiled grammar: some 20 MB
)


class LLGuidanceMatcher:
    """See Matcher."""

    def __init__(self, inner: LLMatcher, forces_tokens: bool) -> None:
        self.inner = inner
        self._forces_tokens = forces_tokens

    def fork(self) -> Self:
        return type(self)(self.inner.deep_copy(), self._forces_tokens)

    def accept(self, token_id: int) -> bool:
        return self.inner.consume_token(token_id)

    def forced_tokens(self) -> list[int]:
        return self.inner.compute_ff_tokens() if self._forces_tokens else []

    @property
    def is_complete(self) -> bool:
        return self.inner.is_stopped() and not self.inner.is_error()

    @property
    def error(self) -> str:
        return _one_line(self.inner.get_error()) if self.inner.is_error() else ""


class LLGuidanceBackend:
    """See GrammarBackend. One thread may compile while another fills masks.

    Args:
        tokenizer: of transformers.
        vocab_size: the model's; ids that the tokenizer does not have are never allowed.
        forces_tokens: matchers say which tokens need no draw.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, forces_tokens: bool = False) -> None:
        self._forces_tokens = forces_tokens
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # The first that the tokenizer does not have: a token that is never drawn, to be the end where no other is.
        self._never_drawn = max(len(tokenizer), *(token_id + 1 for token_id in tokenizer.get_vocab().values()))
        self._size = max(self._never_drawn + 1, vocab_size)
        self._json = _as_json(tokenizer, self._never_drawn)
        self._special = special_tokens(tokenizer)
        self._names = {token_id: text.encode() for text, token_id in self._special.items()}
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}
        self._executor = LLExecutor()

    def compile(self, spec: GrammarSpec, end_ids: Sequence[int]) -> Matcher:
        matcher = _matcher(self._compiled_for(tuple(end_ids)), spec, self._special)
        matcher.compute_bitmask()  # limits may be reached only here; and the next time it is fast
        _check(matcher)
        return LLGuidanceMatcher(matcher, self._forces_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._names:
            return self._names[token_id]
        tokenizer = next(iter(self._tokenizers.values()), None) or self._compiled_for(())
        return tokenizer.decode_bytes([token_id])

    def fill(self, matchers: Sequence[Matcher], words: npt.NDArray[np.int32]) -> None:
        inner = [cast(LLGuidanceMatcher, matcher).inner for matcher in matchers]
        masks = np.full((len(inner), (self._size + 31) // 32), -1, dtype=np.int32)
        stride = masks.strides[0]
        live = [(matcher, i) for i, matcher in enumerate(inner) if not matcher.is_error()]
        if len(live) > 1:
            self._executor.unsafe_compute_mask_ptr(live, masks.ctypes.data, stride, len(inner))
        for matcher, i in live if len(live) == 1 else ():
            matcher.unsafe_compute_mask_ptr(masks.ctypes.data + i * stride, stride)
        word, bit = divmod(self._never_drawn, 32)
        masks.view(np.uint32)[:, word] &= np.uint32(0xFFFFFFFF ^ 1 << bit)
        words[:] = masks[:, : words.shape[1]]

    def _compiled_for(self, end_ids: tuple[int, ...]) -> LLTokenizer:
        if end_ids not in self._tokenizers:
            ends = list(end_ids) or [self._never_drawn]
            source = self._json or TokenizerWrapper(TokenBytes(self._tokenizer, self._size, ends[0]))
            self._tokenizers[end_ids] = LLTokenizer(source, n_vocab=self._size, eos_token=ends)
        return self._tokenizers[end_ids]


def _as_json(tokenizer: Any, never_drawn: int) -> str | None:
    """Return the tokenizer in the tokenizers library's form, with one more token; None if it has none that llguidance
    reads."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    form = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    form["added_tokens"].append({"id": never_drawn, "content": _NEVER_DRAWN, **flags, "special": True})
    text = json.dumps(form)
    try:
        LLTokenizer(text, n_vocab=never_drawn + 1, eos_token=[never_drawn])
    except ValueError:  # it does not know the decoder, or ids have gaps, one of which the token has got
        return None
    return text


def check_grammar(spec: GrammarSpec) -> None:
    """Raise GrammarError for a grammar that cannot be compiled, whatever the tokenizer."""
    matcher = _matcher(_bytes_tokenizer(), spec, {})
    matcher.compute_bitmask()
    _check(matcher)


@cache
def _bytes_tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


def _matcher(tokenizer: LLTokenizer, spec: GrammarSpec, special: Mapping[str, int]) -> LLMatcher:
    matcher = LLMatcher(tokenizer, _grammar(spec, special), log_level=0, limits=_LIMITS)
    _check(matcher)
    return matcher


def _grammar(spec: GrammarSpec, special: Mapping[str, int]) -> str:
    content = _content_grammar(spec, special)
    if spec.around is None:
        return content
    inner = json.loads(content)["grammars"] if content.startswith("{") else [{"lark_grammar": content}]
    (grammar,) = inner  # nothing that a spec says needs more than one
    return json.dumps({"grammars": [{"name": "answer", "lark_grammar": spec.around}, {**grammar, "name": "content"}]})


def _content_grammar(spec: GrammarSpec, special: Mapping[str, int]) -> str:
    try:
        if spec.kind == "json_schema":
            return _json_grammar(spec)
        if spec.kind == "structural_tag":
            return tag_grammar(json.loads(spec.text), special)
        return llguidance.grammar_from(spec.kind, spec.text)
    except GrammarError:
        raise
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except ValueError as error:
        raise GrammarError(_one_line(str(error))) from None


def _json_grammar(spec: GrammarSpec) -> str:
    schema = json.loads(spec.text)
    check_schema(schema)
    kept = without_free_formats(schema)
    text = spec.text if kept == schema else json.dumps(kept)
    pattern = WHITESPACE if spec.whitespace is None else spec.whitespace
    space: dict[str, Any] = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
    return LLMatcher.grammar_from_json_schema(text, overrides=cast(Any, {**space, "lenient": False}))


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(_explained(_one_line(matcher.get_error())))
    if warnings := matcher.get_grammar_warnings():
        raise GrammarError(_one_line(warnings[0]))


def _explained(error: str) -> str:
    if error.startswith(_NO_TEXT):
        return "no text matches it"
    if error.startswith(_UNKNOWN_KEYWORDS):
        return f"keywords that cannot be enforced: {', '.join(json.loads(error.removeprefix(_UNKNOWN_KEYWORDS)))}"
    if error.startswith(_ONE_OF):
        return "oneOf whose alternatives may hold together cannot be enforced: give anyOf"
    return error


def _one_line(text: str) -> str:
    line = " ".join(text.partition("<non-verbose/>")[0].split()) or "unknown error"
    return line if len(line) <= MAX_ERROR_CHARS else f"{line[:MAX_ERROR_CHARS]}..."
