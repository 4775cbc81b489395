"""Text from ids: the same however ids are grouped, equal to the tokenizer's own, cut at stop strings."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_requests import generate_request
from transformers import AutoTokenizer

from rtp_llm.srt.managers.detokenizer import Completion, Detokenizer
from rtp_llm.srt.managers.incremental_text import INCOMPLETE, Decoder, IncrementalText, common_prefix, plain_backend
from rtp_llm.srt.managers.stop_strings import Match, StopMatcher
from rtp_llm.srt.messages import FinishReason, TokenOutput
from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.sampling_params import SamplingParams

TOKENIZERS = ("models/stories260K-hf", "tokenizers/qwen3-tokenizer", "tokenizers/llama3.1-tokenizer")
WORDS = [
    "Once",
    " upon",
    " a",
    "  two",
    "\n\n",
    "中文",
    "字符很好",
    "😀",
    "👩‍👩‍👧",
    "café",
    "日本語",
    " the",
    "<b>",
    "ﷺ",
    "\ufffd",
    "𐍈",
]

texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12).map("".join)
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class CharTokenizer:
    """One character per id; id 0 is special and shown as ``<s>``."""

    all_special_ids = [0]
    added_tokens_decoder: dict[int, Any] = {}

    def decode(self, ids: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return "".join("<s>" if i == 0 else chr(i) for i in ids)


@cache
def load(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(params=TOKENIZERS)
def path(request: pytest.FixtureRequest, data_dir: Path) -> Path:
    """A tokenizer's path: hypothesis prints its arguments, and a tokenizer would print thousands of tokens."""
    return data_dir / request.param


def completion_of(
    ids: list[int], detokenizer: Detokenizer | None, prompt_ids: list[int], groups: Any, **params: Any
) -> Completion:
    """Feeds ``ids``, grouped by the lengths in ``groups``, and ends by length; checks each result on the way."""
    completion = Completion(generate_request("r", prompt_ids, SamplingParams(**params), 0), detokenizer)
    shown = ""
    while ids and not completion.finished:
        size = max(1, min(len(ids), next(groups, 1)))
        head, ids = ids[:size], ids[size:]
        reason = None if ids else FinishReason("length", length=1)
        completion.add(TokenOutput("r", head, [TokenLogprob(i, -1.0) for i in head], finish_reason=reason))
        text = completion.result()["text"]
        assert text.startswith(shown)
        shown = text
    return completion


def chars(text: str) -> list[int]:
    return [ord(character) for character in text]


def run(text: str, sizes: list[int] | None = None, **params: Any) -> tuple[str, int, Any]:
    """``(text, completion tokens, what matched)`` of a completion that would be ``text`` without stop strings."""
    completion = completion_of(chars(text), Detokenizer(CharTokenizer()), [65], iter(sizes or []), **params)
    result = completion.result()
    meta = result["meta_info"]
    assert meta["completion_tokens"] == len(result["output_ids"]) == len(completion._logprobs)
    return result["text"], meta["completion_tokens"], meta["finish_reason"].get("matched")


# Text


@few
@given(data=st.data())
def test_the_backend_alone_gives_the_tokenizers_text(path: Path, data: st.DataObject) -> None:
    tokenizer = load(path)
    assert plain_backend(tokenizer) is not None
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    assert Decoder(tokenizer, skip_special_tokens=False)(ids) == tokenizer.decode(
        ids, clean_up_tokenization_spaces=False, spaces_between_special_tokens=False
    )


def test_a_tokenizer_that_decodes_in_its_own_way_is_asked_itself(data_dir: Path) -> None:
    class Shouting(type(load(data_dir / TOKENIZERS[0]))):  # type: ignore[misc]
        def _decode(self, token_ids: Any, **options: Any) -> str:
            return super()._decode(token_ids, **options).upper()

    tokenizer = Shouting.from_pretrained(data_dir / TOKENIZERS[0])
    assert plain_backend(tokenizer) is None and plain_backend(CharTokenizer()) is None
    text = Decoder(tokenizer, skip_special_tokens=True)(tokenizer.encode("once upon a time"))
    assert "ONCE UPON A TIME" in text


@few
@given(prompt=texts, text=texts)
def test_pieces_are_what_the_ids_add(path: Path, prompt: str, text: str) -> None:
    """Split anywhere, even within a character, the pieces are the rest of the whole text."""
    tokenizer = load(path)
    decode = Decoder(tokenizer, skip_special_tokens=True)
    ids = tokenizer.encode(prompt + text)
    whole = decode(ids)
    if INCOMPLETE in whole:
        return  # a broken character's bytes belong to whoever; see the tests below
    for cut in range(len(ids) + 1):
        incremental = IncrementalText(decode, ids[:cut])
        pieces = [incremental.push(token_id) for token_id in ids[cut:]] + [incremental.flush()]
        assert not any(piece.endswith(INCOMPLETE) for piece in pieces)
        readable = next(end for end in range(cut, -1, -1) if INCOMPLETE not in decode(ids[:end]))
        known = max(len(common_prefix(decode(ids[:end]), whole)) for end in (cut, readable))
        assert "".join(pieces) == whole[known:]


@few
@given(data=st.data())
def test_grouping_does_not_matter(path: Path, data: st.DataObject) -> None:
    tokenizer = load(path)
    token = st.integers(0, len(tokenizer) - 1)
    ids = data.draw(st.lists(token, min_size=1, max_size=60))
    prompt_ids = data.draw(st.lists(token, max_size=12))
    stop = data.draw(st.lists(st.sampled_from(["a", "e ", "th", INCOMPLETE, "\n", "中"]), max_size=2))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer)
    results = []
    for _ in range(2):
        groups = iter(data.draw(st.lists(st.integers(1, 9), max_size=20)))
        result = completion_of(ids, detokenizer, prompt_ids, groups, stop=stop, skip_special_tokens=skip).result()
        del result["meta_info"]["e2e_latency"]
        results.append(result)
    assert results[0] == results[1]


@few
@given(data=st.data())
def test_random_ids_read_as_the_tokenizer_reads_them(path: Path, data: st.DataObject) -> None:
    """Exactly so, but for decoders of byte runs (one of these), which would take back what was given out."""
    tokenizer = load(path)
    if "ByteFallback" in repr(tokenizer.backend_tokenizer.decoder):
        return
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=80))
    decode = Decoder(tokenizer, skip_special_tokens=True)
    incremental = IncrementalText(decode)
    text = "".join([incremental.push(token_id) for token_id in ids] + [incremental.flush()])
    assert text == decode(ids)


def test_bytes_that_do_not_fit_do_not_spoil_their_neighbours(data_dir: Path) -> None:
    tokenizer = load(data_dir / "models/stories260K-hf")
    bad, *good = (tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in b"\xff" + "中文".encode())
    decode = Decoder(tokenizer, skip_special_tokens=True)
    incremental = IncrementalText(decode)
    pieces = [incremental.push(token_id) for token_id in [*good, bad, *good, bad] + tokenizer.encode("a")]
    assert "".join(pieces) == f"中文{INCOMPLETE}中文{INCOMPLETE} a"


def test_endless_bytes_are_not_held_for_ever(path: Path) -> None:
    """Neither kept back for ever nor decoded again and again with all that came before."""
    tokenizer = load(path)
    fallback, byte_level = tokenizer.convert_tokens_to_ids(["<0xE4>", "\u00e4"])  # two ways to write a byte
    byte = fallback if "ByteFallback" in repr(tokenizer.backend_tokenizer.decoder) else byte_level
    decode = Decoder(tokenizer, skip_special_tokens=True)
    incremental = IncrementalText(decode)
    text = "".join(incremental.push(byte) for _ in range(200))
    assert set(text) == {INCOMPLETE}
    assert len(text) > 180
    assert len(incremental._window) < 20


def test_special_tokens_leave_no_trace(path: Path) -> None:
    tokenizer = load(path)
    decode = Decoder(tokenizer, skip_special_tokens=True)
    special = next(iter(decode.skipped))
    words = tokenizer.encode("Once upon a time", add_special_tokens=False)
    incremental = IncrementalText(decode, [*words[:1], *[special] * 50])
    pieces = [incremental.push(token_id) for token_id in [special, words[1], *[special] * 500, *words[2:]]]
    assert "".join(pieces) == decode(words)[len(decode(words[:1])) :]


def test_special_tokens_are_shown_if_asked(data_dir: Path) -> None:
    detokenizer = Detokenizer(load(data_dir / "models/stories260K-hf"))
    shown = completion_of([2, 403], detokenizer, [1], iter([]), skip_special_tokens=False)
    hidden = completion_of([2, 403], detokenizer, [1], iter([]))
    assert (shown.result()["text"], hidden.result()["text"]) == ("</s> Once", "Once")


def test_the_leading_space_survives(data_dir: Path) -> None:
    tokenizer = load(data_dir / "models/stories260K-hf")
    ids = tokenizer.encode("Once upon a time")
    completion = completion_of(ids[2:], Detokenizer(tokenizer), ids[:2], iter([]))
    assert completion.result()["text"] == " upon a time"


# Stop strings


@pytest.mark.parametrize("sizes", [[], [100], [2, 3, 100]])
def test_a_stop_string_cuts_text_ids_and_usage(sizes: list[int]) -> None:
    assert run("one two three", sizes, stop=[" two"]) == ("one", 3, " two")
    assert run("one two three", sizes, stop=["four"]) == ("one two three", 13, None)
    assert run("one two three", sizes, stop=["o"]) == ("", 0, "o")


def test_the_first_of_several_then_the_longest() -> None:
    class Pairs(CharTokenizer):
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join({1: "abc", 2: "xab"}.get(i, chr(i)) for i in ids)

    def matched(ids: list[int], stop: list[str]) -> tuple[str, Any]:
        result = completion_of(ids, Detokenizer(Pairs()), [], iter([9]), stop=stop).result()
        return result["text"], result["meta_info"]["finish_reason"].get("matched")

    assert matched([1], ["b", "ab", "abc"]) == ("", "abc")
    assert matched([2, 99], ["bc", "abc", "ab"]) == ("x", "ab")
    assert matched([2, 99], ["bc", "abcd", "abc"]) == ("x", "abc")


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    completion = Completion(
        generate_request("r", [65], SamplingParams(stop=["</end>"]), 0), Detokenizer(CharTokenizer())
    )
    shown = []
    for part in ("ab<", "/e", "<", "/en", "x"):
        completion.add(TokenOutput("r", chars(part)))
        shown.append(completion.result()["text"])
    assert shown == ["ab", "ab", "ab</e", "ab</e", "ab</e</enx"]
    completion.add(TokenOutput("r", chars("</"), finish_reason=FinishReason("length", length=12)))
    assert completion.result()["text"] == "ab</e</enx</"


@pytest.mark.parametrize("sizes", [[], [100], [4, 4]])
def test_min_new_tokens_forbids_stop_strings(sizes: list[int]) -> None:
    assert run("xxENDyyENDzz", sizes, stop=["END"], min_new_tokens=2) == ("xx", 2, "END")
    assert run("xxENDyyENDzz", sizes, stop=["END"], min_new_tokens=3) == ("xxENDyy", 7, "END")
    assert run("xxENDyyENDzz", sizes, stop=["END"], min_new_tokens=8) == ("xxENDyyENDzz", 12, None)


def test_a_stop_string_in_the_last_message_wins_over_its_reason() -> None:
    detokenizer = Detokenizer(CharTokenizer())
    for reason in (FinishReason("length", length=5), FinishReason("stop", matched=ord("!"))):
        completion = Completion(generate_request("r", [65], SamplingParams(stop=["b"]), 0), detokenizer)
        completion.add(TokenOutput("r", chars("abcd!"), finish_reason=reason))
        result = completion.result()
        assert (result["text"], result["output_ids"]) == ("a", chars("a"))
        assert result["meta_info"]["finish_reason"] == {"type": "stop", "matched": "b"}


def test_what_comes_after_a_stop_string_is_ignored() -> None:
    completion = Completion(generate_request("r", [65], SamplingParams(stop=["b"]), 0), Detokenizer(CharTokenizer()))
    completion.add(TokenOutput("r", chars("ab")))
    completion.add(TokenOutput("r", chars("cd"), finish_reason=FinishReason("abort", message="aborted")))
    assert completion.finished
    assert completion.result()["output_ids"] == chars("a")


def test_a_stop_string_may_end_in_held_bytes() -> None:
    class Halves(CharTokenizer):
        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode(errors="replace")

    ids = [*"é中".encode(), 0x21]
    for size in (1, 2, 9):
        completion = completion_of(ids, Detokenizer(Halves()), [], iter([size] * 9), stop=["中!"])
        assert completion.result()["text"] == "é"
        assert completion.result()["output_ids"] == ids[:2]


@given(text=st.text("ab", max_size=12), stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_against_a_slow_search(text: str, stop: list[str]) -> None:
    """One character per id: the first end of text at which anything matches decides; then start, then length."""
    want: tuple[str, int, str | None] = (text, len(text), None)
    for end in range(len(text) + 1):
        matches = [(end - len(s), -len(s), s) for s in stop if text[:end].endswith(s)]
        if matches:
            start, _, matched = min(matches)
            want = (text[:start], start, matched)
            break
    if text:
        assert run(text, [1, 3, 2, 5], stop=stop) == want


def test_the_matcher_alone() -> None:
    assert StopMatcher(["c", "bc", "bca"]).push("xxbcabc") == Match(2, 5, "bca")
    assert StopMatcher(["x"]).push("abcabc") is None
    assert StopMatcher([]).push("abc") is None
    for text, held in (("xab", 2), ("xabdab", 2), ("", 0), ("ab x", 0)):
        matcher = StopMatcher(["abc", "be"])
        assert matcher.push(text) is None
        assert matcher.held_len == held


@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=8),
    stop=st.lists(st.text("ab", min_size=1, max_size=6), max_size=3),
)
def test_the_matcher_against_a_slow_one(pieces: list[str], stop: list[str]) -> None:
    matcher, text = StopMatcher(stop), ""
    for piece in pieces:
        start, text = len(text), text + piece
        ends = [(string, text.find(string, max(0, start - len(string) + 1))) for string in stop]
        found = min(((at, -len(string), string) for string, at in ends if at >= 0), default=None)
        match = matcher.push(piece)
        assert match == (found and Match(found[0], found[0] - found[1], found[2]))
        if match:
            return
        lengths = [n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])]
        assert matcher.held_len == max(lengths, default=0)


def test_long_stop_strings_cost_a_bounded_number_of_steps_per_character() -> None:
    """Those of a text that is nearly all of each of 32 stop strings: linear in the characters, however they come."""
    compared = 0

    class Counted(str):
        def __getitem__(self, index: Any) -> str:
            nonlocal compared
            compared += 1
            return super().__getitem__(index)

    length, size = 600, 40
    matcher = StopMatcher([Counted("a" * length + chr(0x100 + i)) for i in range(4)])
    for _ in range(size):
        assert matcher.push("a" * 50) is None
        assert matcher.held_len <= length
    assert compared < 4 * 8 * (length + 50 * size)


# Results


def test_the_id_that_stopped_counts_but_has_no_text() -> None:
    completion = Completion(generate_request("r", [65], SamplingParams(), 0), Detokenizer(CharTokenizer()))
    completion.add(TokenOutput("r", chars("ab"), cached_tokens=1))
    assert completion.result()["meta_info"]["finish_reason"] is None
    completion.add(TokenOutput("r", chars("c!"), finish_reason=FinishReason("stop", matched=ord("!"))))
    result = completion.result()
    latency = result["meta_info"].pop("e2e_latency")
    assert latency >= 0
    assert result == {
        "text": "abc",
        "output_ids": chars("abc!"),
        "meta_info": {
            "id": "r",
            "finish_reason": {"type": "stop", "matched": ord("!")},
            "prompt_tokens": 1,
            "completion_tokens": 4,
            "cached_tokens": 1,
            "num_retractions": 0,
        },
    }


def test_logprobs() -> None:
    request = generate_request(
        "r", chars("pqrs"), SamplingParams(stop=["c"]), 0, return_logprob=True, logprob_start_len=1,
        top_logprobs_num=1, token_ids_logprob=(97, 98), return_text_in_logprobs=True,
    )  # fmt: skip
    completion = Completion(request, Detokenizer(CharTokenizer()))

    def item(character: str) -> TokenLogprob:
        return TokenLogprob(ord(character), -1.0, [(-0.5, 120)], [(-2.0, 97), (-3.0, 98)])

    completion.add(TokenOutput("r", prompt_logprobs=[item("r")]))
    completion.add(TokenOutput("r", chars("a"), [item("a")], prompt_logprobs=[item("s")]))
    completion.add(TokenOutput("r", chars("bc"), [item("b"), item("c")]))
    meta = completion.result()["meta_info"]
    top, chosen = [(-0.5, 120, "x")], [(-2.0, 97, "a"), (-3.0, 98, "b")]
    assert meta["input_token_logprobs"] == [(None, 113, "q"), (-1.0, 114, "r"), (-1.0, 115, "s")]
    assert meta["input_top_logprobs"] == [None, top, top]
    assert meta["input_token_ids_logprobs"] == [None, chosen, chosen]
    assert meta["output_token_logprobs"] == [(-1.0, 97, "a"), (-1.0, 98, "b")]
    assert meta["output_top_logprobs"] == [top, top]
    assert meta["output_token_ids_logprobs"] == [chosen, chosen]


@pytest.mark.parametrize("start, num_input", [(-1, 0), (0, 2), (1, 1), (2, 0)])
def test_logprobs_only_as_asked(start: int, num_input: int) -> None:
    request = generate_request("r", chars("pq"), SamplingParams(), 0, return_logprob=True, logprob_start_len=start)
    completion = Completion(request, Detokenizer(CharTokenizer()))
    prompt = [TokenLogprob(113, -1.0)] if start == 0 else []
    completion.add(
        TokenOutput("r", [97], [TokenLogprob(97, -1.0)], prompt, finish_reason=FinishReason("length", length=1))
    )
    meta = completion.result()["meta_info"]
    assert len(meta["input_token_logprobs"]) == num_input
    assert meta["output_token_logprobs"] == [(-1.0, 97, None)]
    assert "input_top_logprobs" not in meta
    assert "output_token_ids_logprobs" not in meta


def test_without_a_tokenizer_there_is_no_text() -> None:
    completion = completion_of([5, 6], None, [1], iter([]))
    assert completion.result()["text"] == ""
    assert completion.result()["output_ids"] == [5, 6]
