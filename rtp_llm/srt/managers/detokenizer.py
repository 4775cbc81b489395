"""From the core's token ids to a request's text, stop strings decided here, and to the result that the caller gets.

Ids are taken one by one, however they were grouped into messages: so the text, and where it stops, depend on the ids
alone.
"""

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rtp_llm.srt.messages import FinishReason, GenerateRequest, TokenOutput
from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.sampling_params import SamplingParams

INCOMPLETE = "\ufffd"  # what decoders put for bytes that are not, or not yet, a character
CONTEXT_TOKENS = 6  # trailing ids decoded along with new ones, since the space before a token depends on what precedes
MAX_CHAR_TOKENS = 4  # a character has at most four bytes, hence tokens
MAX_HELD_TOKENS = 8  # what is no character after so many tokens will never be one
MAX_WINDOW_TOKENS = 24
# Where transformers has the methods of tokenizers that do nothing but call their backend.
_STOCK_METHODS = {"decode": "tokenization_utils_base", "_decode": "tokenization_utils_tokenizers"}


class Decoder:
    """Ids to text with one tokenizer, without the clean-ups that make a text depend on what follows it.

    ``skipped`` are the ids that never give text: the special tokens, with ``skip_special_tokens``.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._backend = plain_backend(tokenizer)
        self.skipped = special_ids(tokenizer) if skip_special_tokens else frozenset()

    def __call__(self, ids: Sequence[int]) -> str:
        kept = [token_id for token_id in ids if token_id not in self.skipped]
        if self._backend is not None:
            return self._backend.decode(kept, skip_special_tokens=False)
        return self._tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
        )


def plain_backend(tokenizer: Any) -> Any:
    """The tokenizer of the tokenizers library behind ``tokenizer``, where transformers' decoding, without clean-ups,
    does nothing but call it, at three times its cost; None for other kinds of tokenizers, and for classes that decode
    in their own way.
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
    """The text that generated ids add to their prompt's text, piece by piece; the pieces concatenate to all of it.

    A window of recent ids, at first the prompt's last few, is decoded at every step:

        window ids  | context, clean: given out whole | pending                         |
        window text | seen                            | given out if whole | U+FFFD...  |

    A point is clean where the window's text ends in a whole character. Trailing U+FFFD are held until the bytes that
    are missing arrive, or it is certain that they never will. Byte-fallback decoders show a whole run of bytes as
    U+FFFD as soon as one of them does not fit: characters that were given out vanish from the window's text, and come
    back or not.
    """

    def __init__(self, decode: Decoder, prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window, self._clean, self._seen = _prompt_context(decode, prompt_ids)
        self._partial = False  # text was given out past the clean point
        self._num_held = 0  # ids since anything was given out

    def push(self, token_id: int) -> str:
        """Takes one generated id; returns the text that is now certain: of this id, of earlier ones too, or none."""
        if token_id in self._decode.skipped:
            return ""
        self._window.append(token_id)
        return self._advance(self._decode(self._window))

    def flush(self) -> str:
        """The text that was held back, for no id will follow. Idempotent."""
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
            self._window.pop()  # an id without text leaves no trace, and a window of them no context
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
        """Shortens the context to a few ids that read the same without what precedes them."""
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
        """Pending ids from ``start`` on make sense only without the bytes before them: decodes the two apart."""
        pending = self._window[self._clean :]
        head = self._decode(pending[:start]) if start else ""
        self._restart(pending[start:])
        return head + self._advance(self._decode(self._window))

    def _release(self) -> str:
        """Gives up on held bytes, but for the last few, which may still begin a character."""
        keep = MAX_CHAR_TOKENS - 1
        piece = self._rest(len(self._window) - keep)
        self._restart(self._window[-keep:])
        self._num_held = keep
        return piece

    def _rest(self, end: int) -> str:
        """What the window's ids up to ``end`` add to what was given out, U+FFFD included."""
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
    """The prompt's last ids with text, from the start of a character on; how many are whole characters; their text.

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


class CompletionText:
    """A completion's text up to its first stop string.

    A stop string counts if it begins after the text of the first ``min_new_tokens`` ids. Of several that are complete
    after the same id, the one that begins first is taken, then the longest. ``matched`` is the stop string, once found.
    """

    def __init__(self, decode: Decoder, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._incremental = IncrementalText(decode, prompt_ids)
        self._stop = params.stop
        self._longest_stop = max(map(len, params.stop), default=0)
        self._min_new_tokens = params.min_new_tokens
        self._search_from = 0
        self._starts: list[int] = []  # per id, where its text begins
        self.text = ""
        self.matched: str | None = None

    def push(self, token_id: int) -> None:
        self._starts.append(len(self.text))
        self._extend(self._incremental.push(token_id))

    def push_silent(self, token_id: int) -> None:
        """Takes the id that ended the generation, which is not part of the text."""
        self.flush()
        self._starts.append(len(self.text))

    def flush(self) -> None:
        """Ends the text; what was held back becomes part of it."""
        self._extend(self._incremental.flush())

    @property
    def num_tokens(self) -> int:
        """How many of the ids belong to the text: those that begin before its end, if a stop string cut it."""
        if self.matched is None:
            return len(self._starts)
        return max(bisect_left(self._starts, len(self.text)), self._min_new_tokens)

    def certain(self) -> str:
        """The text without an end that may turn out to be the beginning of a stop string."""
        return self.text[: len(self.text) - held_len(self.text[self._search_from :], self._stop)]

    @property
    def num_certain_tokens(self) -> int:
        """How many of the ids no stop string can cut any more: those that begin within the certain text."""
        return bisect_left(self._starts, len(self.certain())) if self._stop else len(self._starts)

    def _extend(self, piece: str) -> None:
        start = max(self._search_from, len(self.text) - self._longest_stop + 1)
        self.text += piece
        if len(self._starts) <= self._min_new_tokens:
            self._search_from = len(self.text)
        elif found := find_stop(self.text, self._stop, start):
            position, self.matched = found
            self.text = self.text[:position]


def find_stop(text: str, stop: Sequence[str], start: int) -> tuple[int, str] | None:
    """``(position, string)`` of the stop string in ``text[start:]`` that begins first, the longest of several there."""
    found = [(position, -len(string), string) for string in stop if (position := text.find(string, start)) >= 0]
    if not found:
        return None
    position, _, string = min(found)
    return position, string


def held_len(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of ``text`` that a stop string may begin with."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest


@dataclass(slots=True)
class Delta:
    """What is new and certain of a completion since its last delta. All deltas together are the whole."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]


class Completion:
    """What came back for one request, and the result made of it.

    Feed it the core's messages with ``add`` until ``finished``. If it finishes by a stop string, the core does not
    know: the caller then aborts the request there; messages that still come are ignored. The id by which the core
    stopped must come in the same message as the reason.

    Args:
        detokenizer: None gives no text at all.
        text_in_logprobs: logprob entries carry their token's text.
    """

    def __init__(
        self, request: GenerateRequest, detokenizer: "Detokenizer | None", text_in_logprobs: bool = False
    ) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        self._detokenizer = detokenizer
        self._text_in_logprobs = text_in_logprobs
        self._text = None if detokenizer is None else detokenizer.completion_text(request)
        self._output_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._cached_tokens = 0
        self.prompt_tokens = len(request.prompt_ids)  # the core may tell more: media take what the model says
        self._num_retractions = 0
        self._queue_time_s = 0.0
        self._start_s = time.perf_counter()
        self._latency_s = 0.0
        self._num_taken_chars = 0
        self._num_taken_tokens = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """The text so far, without what may turn out to be the beginning of a stop string."""
        text = self._text
        return "" if text is None else text.text if self.finished else text.certain()

    @property
    def output_ids(self) -> Sequence[int]:
        return self._output_ids

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """One per output id, if logprobs were asked for."""
        return self._logprobs

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        """Those of the prompt's tokens from ``logprob_start_len + 1`` on, as far as they came."""
        return self._prompt_logprobs

    @property
    def queue_time_s(self) -> float:
        """Seconds from arrival in the core to first admission."""
        return self._queue_time_s

    @property
    def cached_tokens(self) -> int:
        return self._cached_tokens

    def take_delta(self) -> Delta:
        """What the last call did not give yet. What a stop string may still cut is held back, ids and logprobs too."""
        chars, tokens = self._num_taken_chars, self._num_taken_tokens
        text = self.text
        end = len(self._output_ids)
        if not self.finished and self._text is not None:
            end = self._text.num_certain_tokens
        self._num_taken_chars, self._num_taken_tokens = len(text), end
        return Delta(text[chars:], self._output_ids[tokens:end], self._logprobs[tokens:end])

    def add(self, output: TokenOutput) -> None:
        if self.finished:
            return
        self._cached_tokens = max(self._cached_tokens, output.cached_tokens)
        self.prompt_tokens = output.prompt_tokens or self.prompt_tokens
        self._num_retractions = max(self._num_retractions, output.num_retractions)
        self._queue_time_s = output.queue_time_s
        self._prompt_logprobs += output.prompt_logprobs
        self._output_ids += output.token_ids
        self._logprobs += output.logprobs
        reason = output.finish_reason
        if self._text is not None:
            reason = self._add_text(self._text, output) or reason
        if reason is not None:
            self.finish_reason = reason
            self._latency_s = time.perf_counter() - self._start_s

    def _add_text(self, text: CompletionText, output: TokenOutput) -> FinishReason | None:
        reason = output.finish_reason
        by_id = reason is not None and reason.type == "stop" and isinstance(reason.matched, int)
        spoken = output.token_ids[:-1] if by_id else output.token_ids
        for token_id in spoken:
            text.push(token_id)
            if text.matched is not None:
                return self._cut(text)
        if by_id:
            text.push_silent(output.token_ids[-1])
        elif reason is not None:
            text.flush()
        return self._cut(text) if text.matched is not None else None

    def _cut(self, text: CompletionText) -> FinishReason:
        del self._output_ids[text.num_tokens :]
        del self._logprobs[text.num_tokens :]
        return FinishReason("stop", matched=text.matched)

    def result(self) -> dict[str, Any]:
        """Everything so far, shaped as the reference does: ``{"text", "output_ids", "meta_info"}``.

        Texts of successive calls extend each other. Logprob entries are tuples ``(logprob, token id, text or None)``,
        present only if asked for; the first prompt entry has no logprob, and None in place of its alternatives.
        """
        return {
            "text": self.text,
            "output_ids": list(self._output_ids),
            "meta_info": self._meta_info(),
        }

    def _meta_info(self) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": self.request.rid,
            "finish_reason": self.finish_reason and self.finish_reason.to_dict(),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self._output_ids),
            "cached_tokens": self._cached_tokens,
            "num_retractions": self._num_retractions,
        }
        if self.finished:
            meta["e2e_latency"] = self._latency_s
        if self.request.return_logprob:
            meta |= self._logprob_lists()
        return meta

    def _logprob_lists(self) -> dict[str, Any]:
        request = self.request
        first = request.prompt_ids[request.logprob_start_len :][:1] if request.logprob_start_len >= 0 else []
        lists: dict[str, Any] = {
            "input_token_logprobs": [self._entry(None, token_id) for token_id in first]
            + [self._entry(item.logprob, item.token_id) for item in self._prompt_logprobs],
            "output_token_logprobs": [self._entry(item.logprob, item.token_id) for item in self._logprobs],
        }
        if request.top_logprobs_num:
            lists["input_top_logprobs"] = [None] * len(first) + [self._entries(i.top) for i in self._prompt_logprobs]
            lists["output_top_logprobs"] = [self._entries(item.top) for item in self._logprobs]
        if request.token_ids_logprob:
            lists["input_token_ids_logprobs"] = [None] * len(first) + [
                self._entries(item.chosen) for item in self._prompt_logprobs
            ]
            lists["output_token_ids_logprobs"] = [self._entries(item.chosen) for item in self._logprobs]
        return lists

    def _entries(self, pairs: list[tuple[float, int]]) -> list[tuple[float | None, int, str | None]]:
        return [self._entry(logprob, token_id) for logprob, token_id in pairs]

    def _entry(self, logprob: float | None, token_id: int) -> tuple[float | None, int, str | None]:
        if self._text_in_logprobs and self._detokenizer is not None:
            return logprob, token_id, self._detokenizer.token_text(token_id)
        return logprob, token_id, None


class Detokenizer:
    """What all requests share: the tokenizer's decoders, with and without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._plain = Decoder(tokenizer, skip_special_tokens=True)
        self._with_special = Decoder(tokenizer, skip_special_tokens=False)

    def completion_text(self, request: GenerateRequest) -> CompletionText:
        decode = self._plain if request.params.skip_special_tokens else self._with_special
        return CompletionText(decode, request.prompt_ids, request.params)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return (self._plain if skip_special_tokens else self._with_special)(ids)

    def token_text(self, token_id: int) -> str:
        """One token alone, as logprob entries show it."""
        return self._with_special([token_id])
