"""The JSON-Schema-Test-Suite, draft 2020-12: what is generated is valid, what is valid can be generated, and what
cannot be honoured is refused."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokens import END, byte_tokenizer
from jsonschema import Draft202012Validator

from rtp_llm.srt.constrained.backend import GrammarBackend, GrammarError, Matcher
from rtp_llm.srt.constrained.llguidance_backend import LLGuidanceBackend
from rtp_llm.srt.request_spec import GrammarSpec

WALKS = 20
MAX_TOKENS = 400
CLOSING = b'"}]'
# Formats are annotations in the suite, which are not asserted; here they are.
ANNOTATIONS = "only an annotation by default"
QUICK_FILES = ("allOf", "anyOf", "enum", "items", "properties", "ref", "required", "type")
LEAST_COMPILED = 160


@pytest.fixture(scope="module")
def backend() -> LLGuidanceBackend:
    return LLGuidanceBackend(byte_tokenizer(), END + 1)


@pytest.fixture(scope="module")
def suite(data_dir: Path) -> Path:
    folder = data_dir / "structured-output" / "JSON-Schema-Test-Suite" / "tests" / "draft2020-12"
    if not folder.is_dir():
        pytest.skip(f"no JSON-Schema-Test-Suite: {folder} does not exist")
    return folder


def cases(suite: Path, *names: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(suite.glob("*.json")):
        if not names or path.stem in names:
            yield from ((path.stem, case) for case in json.loads(path.read_text()))


def compiled(backend: GrammarBackend, schema: Any) -> Matcher | None:
    try:
        return backend.compile(GrammarSpec("json_schema", json.dumps(schema)), [END])
    except GrammarError:
        return None


def walk(backend: GrammarBackend, matcher: Matcher, rng: np.random.Generator) -> bytes | None:
    """Draw tokens at random, closing brackets more often the longer it gets; None: no end within MAX_TOKENS."""
    text = bytearray()
    words = np.empty((1, 9), dtype=np.int32)
    while not matcher.is_complete:
        backend.fill([matcher], words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        assert len(allowed), f"nothing may follow {bytes(text)!r}"
        if allowed[-1] == END and (len(allowed) == 1 or rng.random() < 0.3):
            return bytes(text)
        inner = allowed[allowed < END]
        closing = [token for token in inner if token in CLOSING]
        token = int(rng.choice(closing if closing and rng.random() < 0.15 + len(text) / MAX_TOKENS else inner))
        assert matcher.accept(token), matcher.error
        text.append(token)
        if len(text) == MAX_TOKENS:
            return None
    return bytes(text)


def forms(value: Any) -> Iterator[str]:
    """Texts of a JSON value: whole numbers without a fraction, the members of an object in every order."""
    whole = as_whole_numbers(value)
    yield json.dumps(whole, ensure_ascii=False)
    yield json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
    if isinstance(whole, dict) and len(whole) <= 4:
        for names in permutations(whole):
            yield json.dumps({name: whole[name] for name in names}, ensure_ascii=False)


def as_whole_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_whole_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def accepts(matcher: Matcher, text: str) -> bool:
    taken = matcher.fork()
    return all(taken.accept(byte) for byte in text.encode()) and (taken.is_complete or taken.accept(END))


def is_valid(validator: Draft202012Validator, value: Any, counts: Counter[str]) -> bool:
    """Whether a value is valid; true, and counted apart, where Python's ``re`` cannot read a schema's pattern."""
    try:
        return validator.is_valid(value)
    except re.error:
        counts["walks that cannot be judged"] += 1
        return True


def count(backend: GrammarBackend, suite: Path, *names: str, may_be_narrower: bool = False) -> Counter[str]:
    """Run the suite's files of these names, or all; assert that nothing is wrong, and count.

    Args:
        may_be_narrower: what is valid need not be accepted; this is counted.
    """
    counts: Counter[str] = Counter()
    for name, case in cases(suite, *names):
        schema = case["schema"]
        matcher = compiled(backend, schema)
        counts["refused" if matcher is None else "compiled"] += 1
        if matcher is None:
            continue
        validator = Draft202012Validator(schema)
        rng = np.random.default_rng(0)
        for _ in range(WALKS):
            text = walk(backend, matcher.fork(), rng)
            counts["walks without an end" if text is None else "walks"] += 1
            if text is not None and not is_valid(validator, json.loads(text), counts):
                raise AssertionError((name, case["description"], text))
        for test in case["tests"]:
            if ANNOTATIONS in test["description"]:
                continue
            found = any(accepts(matcher, text) for text in forms(test["data"]))
            counts["instances"] += 1
            if may_be_narrower and test["valid"] and not found:
                counts["valid instances that are not accepted"] += 1
                continue
            assert found == test["valid"], (name, case["description"], test["description"])
    return counts


def test_common_keywords(backend: LLGuidanceBackend, suite: Path) -> None:
    counts = count(backend, suite, *QUICK_FILES)
    assert counts["compiled"] > 40 and counts["walks"] > 800, counts


@pytest.mark.slow
def test_the_whole_suite(backend: LLGuidanceBackend, suite: Path) -> None:
    counts = count(backend, suite)
    print(dict(counts))
    assert counts["compiled"] >= LEAST_COMPILED, counts


@pytest.mark.slow
def test_the_whole_suite_by_xgrammar(suite: Path) -> None:
    """Nothing is weaker than the schema says. Objects with properties have no others, which is narrower."""
    pytest.importorskip("xgrammar")
    from rtp_llm.srt.constrained.xgrammar_backend import XGrammarBackend

    counts = count(XGrammarBackend(byte_tokenizer(), END + 1), suite, may_be_narrower=True)
    print(dict(counts))
    assert counts["compiled"] >= 50 and counts["valid instances that are not accepted"] <= 8, counts
