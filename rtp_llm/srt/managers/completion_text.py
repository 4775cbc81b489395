"""A completion's text, and the stop strings that end it.

Stop strings are searched in the written text, special tokens included; the shown text may leave these out:

    written | ab<|im_end|>cd     stop "b<|im_end|>" cuts after "a"; "abcd" is not in there
    shown   | abcd

While no special token is near, the two are the same text, and only one is decoded.
"""

from bisect import bisect_left
from collections.abc import Sequence

from rtp_llm.srt.managers.incremental_text import CONTEXT_TOKENS, Decoder, IncrementalText, common_prefix
from rtp_llm.srt.managers.stop_strings import Match, StopMatcher
from rtp_llm.srt.sampling_params import SamplingParams


class CompletionText:
    """A completion's text up to its first stop string.

    A stop string counts if it begins after the text of the first ``min_new_tokens`` ids. Of several that are complete
    after the same id, the one that begins first is taken, then the longest. ``matched`` is the stop string, once found.

    Args:
        shown: decodes what the text shows; its ``skipped`` are the special tokens that are left out.
        written: decodes everything.
    """

    def __init__(self, shown: Decoder, written: Decoder, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._shown = IncrementalText(shown, prompt_ids)
        self._hidden = shown.skipped
        self._decode_written = written
        self._written: IncrementalText | None = None  # None while it equals the shown text
        self._matcher = StopMatcher(params.stop) if params.stop else None
        self._min_new_tokens = params.min_new_tokens
        self._includes_stop = params.include_stop_str_in_output
        self._match: Match | None = None
        self._is_ended_by_id = False
        self._num_ids = 0
        self._num_written = 0  # characters
        self._starts: list[int] = []  # per id, where its text begins in the written text; only with stop strings
        self._shown_starts: list[int] = []  # and in the shown text
        self._gaps: dict[int, int] = {}  # per hidden id, characters before it that are written but never shown
        self._held: dict[int, str] = {}  # id's index -> shown text held back before it
        self.text = ""
        if self._matcher is not None and not self._hidden.isdisjoint(prompt_ids):
            self._written = IncrementalText(written, prompt_ids)
            self._join()

    @property
    def matched(self) -> str | None:
        return None if self._match is None else self._match.string

    def push(self, token_id: int) -> None:
        self._num_ids += 1
        if self._matcher is None:
            self.text += self._shown.push(token_id)
        else:
            self._push(self._matcher, token_id)

    def push_last(self, token_id: int) -> None:
        """Take the id that ended the generation, and end the text. The id's text is included if stop strings are.
        A stop string that ends in it cuts the text; one that begins in it does not, for the id came first.
        """
        self._is_ended_by_id = True
        if self._matcher is None:
            self._num_ids += 1
            self.text += self._shown.push(token_id) if self._includes_stop else ""
        elif self._includes_stop:
            self.push(token_id)
        else:
            self._push_silent(self._matcher, token_id)
        self.flush()

    def flush(self) -> None:
        """End the text; what was held back becomes part of it."""
        if self._match is not None:
            return
        piece = self._shown.flush()
        self.text += piece
        if self._matcher is not None:
            written = piece if self._written is None else self._written.flush()
            self._search(self._matcher, written, 0)

    @property
    def num_tokens(self) -> int:
        """Number of ids that belong to the text: those that begin before its end, if a stop string cut it."""
        if self._match is None:
            return self._num_ids
        end = self._match.end if self._includes_stop else self._match.start
        return max(bisect_left(self._starts, end), self._min_new_tokens)

    def certain(self) -> str:
        """Return the text without an end that may be the beginning of a stop string."""
        if self._matcher is None or self._match is not None or not self._matcher.held_len:
            return self.text
        return self.text[: self._shown_position(self._num_written - self._matcher.held_len)]

    @property
    def num_certain_tokens(self) -> int:
        """Number of ids that no stop string can cut any more: those that begin within the certain text."""
        if self._matcher is None:
            return self._num_ids
        return bisect_left(self._starts, self._num_written - self._matcher.held_len)

    def _push(self, matcher: StopMatcher, token_id: int) -> None:
        is_hidden = token_id in self._hidden
        if is_hidden and self._written is None:
            self._written = self._shown.fork(self._decode_written)
        shown_start, piece, held = self._pushed(self._shown, token_id)
        start, written = shown_start, piece
        if self._written is not None:
            start, written, shared = self._pushed(self._written, token_id)
            if held and not shared:  # otherwise the id continues the held character
                self._held[len(self._starts)] = held
        if is_hidden:
            start = self._hidden_start(written, token_id)
        self._starts.append(self._num_written + start)
        self._shown_starts.append(len(self.text) + shown_start)
        self.text += piece
        self._search(matcher, written, start)
        self._join()

    def _pushed(self, stream: IncrementalText, token_id: int) -> tuple[int, str, str]:
        """Push an id; return ``(start, piece, held)``: the piece that it releases, the start of the id's own text in
        it, after text of earlier ids that was held back, and ``held``, the part of that which is not in the piece.
        """
        held = stream.held()
        piece = stream.push(token_id)
        start = len(common_prefix(held, piece))
        return start, piece, held[start:]

    def _hidden_start(self, piece: str, token_id: int) -> int:
        """Return where a special token's text begins in its piece: after held text, or a decoder's space."""
        start = max(0, len(piece) - len(self._decode_written([token_id])))
        self._gaps[len(self._starts)] = start
        return start

    def _push_silent(self, matcher: StopMatcher, token_id: int) -> None:
        """Push an id that is written and never shown."""
        written = self._written or self._shown.fork(self._decode_written)
        start, piece, shared = self._pushed(written, token_id)
        if not shared:
            self._held[len(self._starts)] = self._shown.held()
        self._written = written
        if token_id in self._hidden:
            start = self._hidden_start(piece, token_id)
        self._num_ids += 1
        self._starts.append(self._num_written + start)
        self._shown_starts.append(len(self.text))
        self._search(matcher, piece, start)

    def _search(self, matcher: StopMatcher, piece: str, start: int) -> None:
        """Search for stop strings in a new written piece; ``start``: where the newest id's text begins in it."""
        num_banned = 0
        if self._num_ids <= self._min_new_tokens:
            num_banned = len(piece)
        elif self._num_ids == self._min_new_tokens + 1 and self._min_new_tokens:
            num_banned = start
        matcher.skip(num_banned)
        self._num_written += len(piece)
        match = matcher.push(piece[num_banned:])
        if match is not None and not (self._is_ended_by_id and match.start >= self._starts[-1]):
            self._match = match
            self._cut(match)

    def _cut(self, match: Match) -> None:
        num_ids = bisect_left(self._starts, match.start)
        text = self.text[: self._shown_position(match.start)]
        if num_ids < len(self._starts) and self._starts[num_ids] == match.start:
            text += self._held.get(num_ids, "")
        self.text = text + (match.string if self._includes_stop else "")

    def _shown_position(self, position: int) -> int:
        """Return the position in the shown text of one in the written text; in a hidden token, where it would stand."""
        num_ids = bisect_left(self._starts, position)  # that begin before it
        if num_ids == 0:
            return 0
        is_last = num_ids == len(self._starts)
        end = self._num_written if is_last else self._starts[num_ids] - self._gaps.get(num_ids, 0)
        shown_end = len(self.text) if is_last else self._shown_starts[num_ids]
        return min(shown_end, max(self._shown_starts[num_ids - 1], shown_end - (end - position)))

    def _join(self) -> None:
        """Return to one text when special tokens are too far behind to change what follows."""
        if self._written is None or self._written.is_holding or self._shown.is_holding:
            return
        written, shown = self._written.window, self._shown.window
        recent = written[-CONTEXT_TOKENS:]
        if written == shown or (len(recent) == CONTEXT_TOKENS and recent == shown[-CONTEXT_TOKENS:]):
            self._written = None
