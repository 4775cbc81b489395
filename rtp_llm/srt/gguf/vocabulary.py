"""The vocabulary in a GGUF's metadata (keys ``tokenizer.ggml.…``), checked."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gguf import TokenType

from rtp_llm.srt.gguf.header import GGUFError

logger = logging.getLogger(__name__)

PREFIX = "tokenizer.ggml."
MODEL_KEY, PRE_KEY = f"{PREFIX}model", f"{PREFIX}pre"
TOKENS_KEY, TYPES_KEY, SCORES_KEY = f"{PREFIX}tokens", f"{PREFIX}token_type", f"{PREFIX}scores"
MERGES_KEY, CHARSMAP_KEY = f"{PREFIX}merges", f"{PREFIX}precompiled_charsmap"
SPECIAL_KEYS = {
    "bos": f"{PREFIX}bos_token_id",
    "eos": f"{PREFIX}eos_token_id",
    "eot": f"{PREFIX}eot_token_id",
    "eom": f"{PREFIX}eom_token_id",
    "unk": f"{PREFIX}unknown_token_id",
    "sep": f"{PREFIX}seperator_token_id",  # the format's own spelling
    "pad": f"{PREFIX}padding_token_id",
    "cls": f"{PREFIX}cls_token_id",
    "mask": f"{PREFIX}mask_token_id",
}
_NEEDED = ("bos", "eos", "unk")
# The ids that llama.cpp takes for what a file does not say.
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unk": 0},
    "gpt2": {"bos": 11, "eos": 11},
    "t5": {"eos": 1, "unk": 2, "pad": 0},
    "bert": {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
    "gemma4": {},
}
# Texts of tokens that end an answer wherever they stand, as llama.cpp knows them; some files name only one of theirs.
_END_TEXTS = frozenset((
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "</s>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
))  # fmt: skip
# Where these are beside it, <|end|> ends a message of a turn that goes on.
_MESSAGE_END, _TURN_ENDS = (
    "<|end|>",
    ({"<|return|>", "<|call|>"}, {"<|call|>", "<|flush|>"}, {"<|calls|>", "<|flush|>"}),
)
_SPECIAL_SHAPE = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_UNMISTAKABLE = re.compile(r"<\|.+\|>|<｜.+｜>|<(start|end)_of_\w+>")  # no text of a corpus
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of its tokenizer.

    ``kind``: ``tokenizer.ggml.model``. ``pre``: the way to cut text into words; None: not said. ``tokens``: all
    different, none empty; ``types``: one for each token. ``scores``: one for each token, or empty. ``merges``: pairs of
    tokens, best first, without repetitions; None: not said. ``special``: bos, eos, ... to ids. ``flags``: those of the
    ``add_…`` kind and such that the file has, by the key's last part. ``charsmap``: sentencepiece's normalisation.
    """

    kind: str
    pre: str | None
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float] = ()
    merges: Sequence[tuple[str, str]] | None = None
    special: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    charsmap: bytes = b""

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: token_id for token_id, token in enumerate(self.tokens)}

    def of_types(self, *types: TokenType) -> list[int]:
        return [token_id for token_id, kind in enumerate(self.types) if kind in types]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Read and check the vocabulary.

    Raises:
        GGUFError: a key is missing, or has a value of a wrong type or length, or one that contradicts another key.
    """
    kind = _value(metadata, MODEL_KEY, str)
    if kind is None:
        raise GGUFError(f"{MODEL_KEY} is missing: the file brings no tokenizer")
    if kind not in _DEFAULT_IDS:
        raise GGUFError(f"{MODEL_KEY} {kind!r} is not supported; supported are {', '.join(_DEFAULT_IDS)}")
    tokens = _tokens(metadata)
    types = _types(metadata, tokens)
    return Vocabulary(
        kind,
        _value(metadata, PRE_KEY, str) or None,
        tokens,
        types,
        _scores(metadata, len(tokens)),
        _merges(metadata, tokens),
        _special(metadata, kind, tokens, types),
        _flags(metadata),
        _charsmap(metadata),
    )


def known_ends(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids of tokens that end an answer by their text: files name one of them where generation_config.json
    has all. The text alone does not count if it is a normal token's, or one that is text elsewhere: Gemma's </s> is a
    user-defined tag.

    Raises:
        GGUFError: the tokens or their types are damaged.
    """
    if TOKENS_KEY not in metadata:
        return []
    tokens = _tokens(metadata)
    types = _types(metadata, tokens)
    ids = {token: i for i, token in enumerate(tokens) if token in _END_TEXTS and _is_end(token, types[i])}
    if any(ends <= ids.keys() for ends in _TURN_ENDS):
        ids.pop(_MESSAGE_END, None)
    return sorted(ids.values())


def _is_end(token: str, kind: TokenType) -> bool:
    is_marked = kind is TokenType.USER_DEFINED and _UNMISTAKABLE.fullmatch(token) is not None
    return kind is TokenType.CONTROL or is_marked


def _value(metadata: Mapping[str, Any], key: str, expected: type) -> Any:
    value = metadata.get(key)
    if value is not None and type(value) is not expected:
        raise GGUFError(f"{key} must be of type {expected.__name__}, not {type(value).__name__}")
    return value


def _list(metadata: Mapping[str, Any], key: str, *expected: type) -> list[Any] | None:
    values = _value(metadata, key, list)
    if values is None:
        return None
    wrong = next((i for i, value in enumerate(values) if type(value) not in expected), None)
    if wrong is not None:
        names = " or ".join(kind.__name__ for kind in expected)
        raise GGUFError(f"{key}[{wrong}] must be of type {names}, not {type(values[wrong]).__name__}")
    return list(values)


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = _list(metadata, TOKENS_KEY, str)
    if not tokens:
        raise GGUFError(f"{TOKENS_KEY} is {'missing' if tokens is None else 'empty'}")
    tokens = [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(tokens)]  # llama.cpp's name for it
    if len(set(tokens)) < len(tokens):
        first: dict[str, int] = {}
        for token_id, token in enumerate(tokens):
            if first.setdefault(token, token_id) != token_id:
                raise GGUFError(f"{TOKENS_KEY} has {token!r} twice, as ids {first[token]} and {token_id}")
    return tokens


def _types(metadata: Mapping[str, Any], tokens: list[str]) -> list[TokenType]:
    values = _list(metadata, TYPES_KEY, int)
    if values is None:  # as in files of 2023
        return [_type_of(token) for token in tokens]
    _check_length(TYPES_KEY, len(values), len(tokens))
    known = {int(kind): kind for kind in TokenType} | {0: TokenType.NORMAL}  # 0: undefined
    wrong = next((i for i, value in enumerate(values) if value not in known), None)
    if wrong is not None:
        raise GGUFError(f"{TYPES_KEY}[{wrong}] is {values[wrong]}; there are types 0 to {max(known)}")
    types = [known[value] for value in values]
    for token_id, token in enumerate(tokens):
        if types[token_id] is TokenType.NORMAL and token in _END_TEXTS and _UNMISTAKABLE.fullmatch(token):
            logger.warning("%s: %r (%d) is taken as a control token, not a normal one", TYPES_KEY, token, token_id)
            types[token_id] = TokenType.CONTROL
    return types


def _type_of(token: str) -> TokenType:
    if _BYTE.fullmatch(token):
        return TokenType.BYTE
    return TokenType.CONTROL if _UNMISTAKABLE.fullmatch(token) else TokenType.NORMAL


def _scores(metadata: Mapping[str, Any], num_tokens: int) -> list[float]:
    scores = _list(metadata, SCORES_KEY, float, int)
    if scores is None:
        return []
    _check_length(SCORES_KEY, len(scores), num_tokens)
    wrong = next((i for i, score in enumerate(scores) if score != score), None)
    if wrong is not None:
        raise GGUFError(f"{SCORES_KEY}[{wrong}] is not a number")
    return [float(score) for score in scores]


def _check_length(key: str, length: int, num_tokens: int) -> None:
    if length != num_tokens:
        raise GGUFError(f"{key} has {length} values for the {num_tokens} of {TOKENS_KEY}")


def _merges(metadata: Mapping[str, Any], tokens: list[str]) -> list[tuple[str, str]] | None:
    merges = _list(metadata, MERGES_KEY, str)
    if merges is None:
        return None
    known = set(tokens)
    pairs: dict[tuple[str, str], None] = {}
    for i, merge in enumerate(merges):
        cut = merge.find(" ", 1)  # a token may begin with a space
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not right:
            raise GGUFError(f"{MERGES_KEY}[{i}] is {merge!r}, not two tokens with a space between")
        if not (left in known and right in known and left + right in known):
            missing = next(token for token in (left, right, left + right) if token not in known)
            raise GGUFError(f"{MERGES_KEY}[{i}] is {merge!r}, but {missing!r} is not in {TOKENS_KEY}")
        pairs.setdefault((left, right))
    return list(pairs)


def _special(metadata: Mapping[str, Any], kind: str, tokens: list[str], types: list[TokenType]) -> dict[str, int]:
    """Return the special tokens' ids. One that the file does not say is llama.cpp's default, if that is a token which
    is not for text: 11, for instance, is Falcon's end of text, and a comma elsewhere. One that does not exist is an
    error only where texts depend on it: some published files have such a pad token."""
    ids: dict[str, int] = {}
    for name, key in SPECIAL_KEYS.items():
        token_id = _value(metadata, key, int)
        if token_id is None:
            default = _DEFAULT_IDS[kind].get(name, len(tokens))
            if default < len(tokens) and _may_be_special(tokens[default], types[default], TYPES_KEY in metadata):
                ids[name] = default
        elif 0 <= token_id < len(tokens):
            ids[name] = token_id
        elif name in _NEEDED:
            raise GGUFError(f"{key} is {token_id}, outside the {len(tokens)} of {TOKENS_KEY}")
        else:
            logger.warning("%s is left out: there is no token %d among %d", key, token_id, len(tokens))
    return ids


def _may_be_special(token: str, kind: TokenType, are_types_known: bool) -> bool:
    if are_types_known:
        return kind in (TokenType.CONTROL, TokenType.UNKNOWN)
    return _SPECIAL_SHAPE.fullmatch(token) is not None


def _flags(metadata: Mapping[str, Any]) -> dict[str, bool]:
    names = (
        "add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces", "normalizer.lowercase",
        "normalizer.strip_accents",
    )  # fmt: skip
    found = {name: _value(metadata, PREFIX + name, bool) for name in names}
    return {name: flag for name, flag in found.items() if flag is not None}


def _charsmap(metadata: Mapping[str, Any]) -> bytes:
    values = _list(metadata, CHARSMAP_KEY, int) or []
    wrong = next((i for i, value in enumerate(values) if not -128 <= value < 256), None)
    if wrong is not None:
        raise GGUFError(f"{CHARSMAP_KEY}[{wrong}] is {values[wrong]}, not a byte")
    return bytes(value & 255 for value in values)
