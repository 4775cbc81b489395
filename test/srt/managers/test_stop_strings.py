"""Stop strings are looked for in what the model wrote, special tokens included, whatever is shown of it."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_requests import generate_request
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rtp_llm.srt.managers.detokenizer import Completion, Detokenizer
from rtp_llm.srt.managers.incremental_text import INCOMPLETE
from rtp_llm.srt.messages import FinishReason, TokenOutput
from rtp_llm.srt.plan import TokenLogprob
from rtp_llm.srt.sampling_params import SamplingParams

REAL = ("models/stories260K-hf", "tokenizers/qwen3-tokenizer", "tokenizers/llama3.1-tokenizer")
BUILT = ("byte-level", "spaced")
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = ("a", "b", "ab", " end", "中", "😀", " a")


@cache
def load(name: str) -> Any:
    if name in BUILT:
        return build(name)
    return AutoTokenizer.from_pretrained(name)


def build(kind: str) -> Any:
    """``byte-level``: a byte per id; ``spaced``: words with spaces between them, around special tokens, too."""
    if kind == "byte-level":
        vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        vocabulary = {word: i for i, word in enumerate(["a", "b", "ab", "end", "##d", "[UNK]"])}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    fast.add_tokens(["<plain>"])
    return fast


@pytest.fixture(params=[*BUILT, *REAL])
def name(request: pytest.FixtureRequest, data_dir: Path) -> str:
    return request.param if request.param in BUILT else str(data_dir / request.param)


def complete(
    tokenizer: Any, ids: list[int], sizes: Iterator[int], prompt_ids: list[int] | None = None, **options: Any
) -> tuple[str, list[int], Any]:
    """``(text, ids kept, what matched)``. Deltas are the whole, and nothing is given that is not in the end kept."""
    by_id = options.pop("by_id", False)
    request = generate_request("r", prompt_ids or [], SamplingParams(**options), 0)
    completion = Completion(request, Detokenizer(tokenizer))
    text, kept = "", []
    while ids and not completion.finished:
        size = max(1, next(sizes, 1))
        head, ids = ids[:size], ids[size:]
        reason = None if ids else FinishReason("stop", matched=head[-1]) if by_id else FinishReason("length", length=9)
        if by_id and len(ids) == 1:
            head, ids = [*head, *ids], []  # the id that stops comes with its reason
            reason = FinishReason("stop", matched=head[-1])
        completion.add(TokenOutput("r", head, [TokenLogprob(i, -1.0) for i in head], finish_reason=reason))
        delta = completion.take_delta()
        text, kept = text + delta.text, kept + delta.token_ids
        assert text == completion.text
        assert len(delta.logprobs) == len(delta.token_ids)
    assert kept == completion.output_ids
    assert completion.finish_reason is not None
    return text, kept, completion.finish_reason.matched


def oracle(tokenizer: Any, ids: list[int], stop: list[str], skip: bool) -> tuple[str, int, str | None]:
    """``(text, number of ids, what matched)``: decodes everything again for each id, searches and cuts."""
    detokenizer = Detokenizer(tokenizer)

    def written(count: int) -> str:
        return detokenizer.decode(ids[:count], False)

    def shown(count: int) -> str:
        return detokenizer.decode(ids[:count], skip)

    for end in range(1, len(ids) + 1):
        text = written(end)
        certain = text if end == len(ids) else text.rstrip(INCOMPLETE)
        found = [(certain.find(s), -len(s), s) for s in stop if s in certain]
        if not found:
            continue
        position, _, matched = min(found)
        bounds = [i for i in range(end + 1) if text.startswith(written(i))]
        first = max(i for i in bounds if len(written(i)) <= position)
        first = min(i for i in bounds if written(i) == written(first))
        if len(written(first)) == position:
            return shown(first), first, matched
        last = min(i for i in bounds if len(written(i)) > position)
        if skip and ids[last - 1] in tokenizer.all_special_ids:
            own = len(written(last)) - len(detokenizer.decode(ids[last - 1 : last], False))
            return shown(first), first if position <= own else last, matched  # a decoder may add a space before it
        cut = len(shown(last)) - (len(written(last)) - position)
        return shown(last)[: max(cut, len(shown(first)))], last, matched
    return shown(len(ids)), len(ids), None


def id_of(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


@cache
def specials(name: str) -> list[int]:
    tokenizer = load(name)
    return sorted(tokenizer.all_special_ids)[-2:]


@few
@given(data=st.data())
def test_against_decoding_everything(name: str, data: st.DataObject) -> None:
    tokenizer, special = load(name), specials(name)
    word = st.sampled_from(WORDS).map(lambda word: tokenizer.encode(word, add_special_tokens=False))
    parts = data.draw(st.lists(word | st.sampled_from(special).map(lambda i: [i]), min_size=1, max_size=14))
    ids = [token_id for part in parts for token_id in part]
    written = Detokenizer(tokenizer).decode(ids, False)
    cuts = st.tuples(st.integers(0, len(written)), st.integers(1, 14))
    strings = cuts.map(lambda cut: written[cut[0] : sum(cut)]).filter(bool) if written else st.just("ab")
    stop = data.draw(st.lists(strings | st.sampled_from(["ab", "zz", "d<", ">a"]), max_size=3))
    skip = data.draw(st.booleans())
    sizes = iter(data.draw(st.lists(st.integers(1, 5), max_size=20)))
    text, kept, matched = complete(tokenizer, ids, sizes, stop=stop, skip_special_tokens=skip)
    assert (text, len(kept), matched) == oracle(tokenizer, ids, stop, skip)


@few
@given(data=st.data())
def test_grouping_does_not_matter_for_any_ids(name: str, data: st.DataObject) -> None:
    """Parts of characters beside special tokens, after prompts that end anywhere."""
    tokenizer, special = load(name), specials(name)
    token = st.sampled_from([*special, *tokenizer.encode("😀中 a", add_special_tokens=False)])
    ids = data.draw(st.lists(token, min_size=1, max_size=30))
    prompt_ids = data.draw(st.lists(token, max_size=12))
    end = tokenizer.decode([special[0]])
    stop = data.draw(st.lists(st.sampled_from(["a", "a" + end, end, end + INCOMPLETE, end + " a", "中a"]), max_size=2))
    options = {
        "stop": stop,
        "prompt_ids": prompt_ids,
        "skip_special_tokens": data.draw(st.booleans()),
        "include_stop_str_in_output": data.draw(st.booleans()),
        "min_new_tokens": data.draw(st.integers(0, 3)),
        "by_id": data.draw(st.booleans()),
    }
    first, second = (
        complete(tokenizer, ids, iter(data.draw(st.lists(st.integers(1, 9), max_size=20))), **options) for _ in "12"
    )
    assert first == second
    if first[2] in stop and first[1] and not options["include_stop_str_in_output"]:
        alone = complete(
            tokenizer, first[1], iter([]), prompt_ids=prompt_ids, skip_special_tokens=options["skip_special_tokens"]
        )
        assert alone[0].startswith(first[0])  # as if the model had ended there
    if first[2] not in stop:
        free = complete(tokenizer, ids, iter([]), **{**options, "stop": []})
        assert first == free  # what is shown is the same with stop strings that are not found


def test_a_special_token_is_a_stop_string(name: str) -> None:
    tokenizer, end = load(name), specials(name)[0]
    marker = tokenizer.decode([end])
    words = tokenizer.encode("a end", add_special_tokens=False)
    shown = Detokenizer(tokenizer).decode(words, True)
    ids = [*words, end, *words]
    for stop in (marker, shown[-3:] + marker, marker + Detokenizer(tokenizer).decode(ids, False).split(marker)[1][:2]):
        for sizes in ([], [99], [3, 1, 2]):
            text, kept, matched = complete(tokenizer, ids, iter(sizes), stop=stop)
            cut = shown.removesuffix(stop.removesuffix(marker)) if stop.endswith(marker) else shown
            if name != "spaced" or not stop.endswith("d" + marker):  # there the decoder puts a space between
                assert (text, matched) == (cut, stop)
                assert stop.startswith("end") or kept == words


def test_what_is_shown_together_is_not_written_together() -> None:
    tokenizer = build("byte-level")
    ids = [*tokenizer.encode("ab"), id_of(tokenizer, "<|end|>"), *tokenizer.encode("cd")]
    assert complete(tokenizer, ids, iter([]), stop="abcd") == ("abcd", ids, None)
    assert complete(tokenizer, ids, iter([]), stop="<|end|>cd") == ("ab", ids[:2], "<|end|>cd")
    plain = [*tokenizer.encode("ab"), id_of(tokenizer, "<plain>"), *tokenizer.encode("cd")]
    assert complete(tokenizer, plain, iter([]), stop="b<pl") == ("a", plain[:1], "b<pl")  # added, but not special


def test_the_beginning_of_a_hidden_stop_string_is_held_back() -> None:
    tokenizer = build("byte-level")
    end, turn = id_of(tokenizer, "<|end|>"), id_of(tokenizer, "<|turn|>")
    request = generate_request("r", [turn], SamplingParams(stop=["b<|end|>\nx"]), 0)
    completion = Completion(request, Detokenizer(tokenizer))
    shown = []
    for ids in (tokenizer.encode("ab"), [end], tokenizer.encode("\n"), tokenizer.encode("y"), tokenizer.encode("b")):
        completion.add(TokenOutput("r", ids))
        delta = completion.take_delta()
        shown.append((delta.text, len(delta.token_ids)))
    assert shown == [("a", 1), ("", 0), ("", 0), ("b\ny", 4), ("", 0)]


@pytest.mark.parametrize("sizes", [[], [99], [2, 2]])
def test_a_part_of_a_character_before_a_special_token(sizes: list[int]) -> None:
    """As if the model had ended there: it is shown as one that is not whole, and counts."""
    tokenizer = build("byte-level")
    part, end = tokenizer.encode("中")[:2], id_of(tokenizer, "<|end|>")
    a = tokenizer.encode("a")
    for stop in ("<|end|>", "<|end|>a"):
        assert complete(tokenizer, [*a, *part, end, *a], iter(sizes), stop=stop) == (
            f"a{INCOMPLETE}",
            [*a, *part],
            stop,
        )
    for ids in ([end, *part], [end, *part[:1], *part[:1]]):
        text = Detokenizer(tokenizer).decode(ids, True)
        assert complete(tokenizer, [*ids, *a, *a], iter(sizes), stop="aa") == (text, ids, "aa")
    assert complete(tokenizer, [*a, *part, *a, *a], iter(sizes), stop="aa") == (f"a{INCOMPLETE}", [*a, *part], "aa")


def test_min_new_tokens_holds_for_hidden_tokens() -> None:
    tokenizer = build("byte-level")
    end, a = id_of(tokenizer, "<|end|>"), tokenizer.encode("a")
    ids = [*a, end, *a, end, *a]
    assert complete(tokenizer, ids, iter([]), stop="<|end|>", min_new_tokens=2) == ("aa", ids[:3], "<|end|>")
    assert complete(tokenizer, ids, iter([]), stop="<|end|>", min_new_tokens=1) == ("a", ids[:1], "<|end|>")
    part = tokenizer.encode("中")[:1]  # shown only when it is certain that no more of it comes, but it was first
    ids = [*part, *a, *a]
    for stop, matched in ((INCOMPLETE + "a", None), ("aa", "aa")):
        whole = complete(tokenizer, ids, iter([]), stop=stop, min_new_tokens=1)
        assert whole == ((INCOMPLETE, ids[:1], "aa") if matched else (f"{INCOMPLETE}aa", ids, None))


@pytest.mark.parametrize("option", ["include_stop_str_in_output", "no_stop_trim"])
def test_the_stop_string_stays_if_asked(option: str) -> None:
    tokenizer = build("byte-level")
    end, turn = id_of(tokenizer, "<|end|>"), id_of(tokenizer, "<|turn|>")
    ids = [*tokenizer.encode("one two"), end, *tokenizer.encode("three")]
    for sizes in ([], [99], [4, 6]):
        assert complete(tokenizer, ids, iter(sizes), stop="tw", **{option: True}) == ("one tw", ids[:6], "tw")
        assert complete(tokenizer, ids, iter(sizes), stop="o<|end|>t", **{option: True}) == (
            "one two<|end|>t",
            ids[:9],
            "o<|end|>t",
        )
    ended = [*tokenizer.encode("ab"), turn]
    for skip, text in ((True, "ab"), (False, "ab<|turn|>")):
        options = {option: True, "skip_special_tokens": skip, "by_id": True}
        assert complete(tokenizer, ended, iter([]), **options) == (text, ended, turn)
        assert complete(tokenizer, ended, iter([]), **options, stop="<|turn|>") == (text, ended, turn)
    assert complete(tokenizer, ended[:2], iter([]), by_id=True, **{option: True})[0] == "ab"
    assert complete(tokenizer, ended[:2], iter([]), by_id=True)[0] == "a"


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_may_end_in_the_id_that_stopped(skip: bool) -> None:
    tokenizer = build("byte-level")
    ids = [*tokenizer.encode("the end"), id_of(tokenizer, "<|end|>")]
    options: dict[str, Any] = {"by_id": True, "skip_special_tokens": skip}
    assert complete(tokenizer, ids, iter([]), stop="end<|end|>", **options) == ("the ", ids[:4], "end<|end|>")
    assert complete(tokenizer, ids, iter([]), stop="<|end|>", **options) == ("the end", ids, ids[-1])


def test_one_text_is_decoded_where_no_special_token_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build("byte-level")
    detokenizer = Detokenizer(tokenizer)
    decoded = {"written": 0, "shown": 0}
    for kind, decoder in (("written", detokenizer._with_special), ("shown", detokenizer._plain)):
        backend = decoder._backend

        class Counted:
            def decode(self, *args: Any, _kind: str = kind, _backend: Any = backend, **options: Any) -> str:
                decoded[_kind] += 1
                return _backend.decode(*args, **options)

        decoder._backend = Counted()
    prompt = [id_of(tokenizer, "<|turn|>")]
    completion = Completion(generate_request("r", prompt, SamplingParams(stop=["<|end|>"]), 0), detokenizer)
    completion.add(TokenOutput("r", tokenizer.encode("x" * 500)))
    assert decoded["written"] < 15 < 450 < decoded["shown"]
