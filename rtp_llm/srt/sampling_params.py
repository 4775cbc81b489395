"""Validated sampling parameters of one request. Host only, no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Self

MAX_STOP_STRINGS = 32
MAX_BAD_WORDS = 256
MAX_STOP_CHARS = 1024  # of each: several times the longest in use, and short enough to compare with any text
MAX_COMPLETIONS = 4096  # of one prompt: each is a request, made before the first one runs
DEFAULT_MAX_NEW_TOKENS = 128
MAX_INT = 2**63 - 1  # largest int of kernels and messages
MAX_KEY_DIGITS = 19  # of a token id as a string


class InvalidRequest(ValueError):
    """A request that cannot be served. ``param`` names the wrong field, if it is one field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(InvalidRequest):
    """A prompt, or a prompt with its ``max_new_tokens``, is longer than a request may be."""


def _param(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(slots=True)
class SamplingParams:
    """How to sample a request's tokens, and when to end it. Construction raises InvalidRequest for a wrong value.

    ``stop`` may be given as one string and ``logit_bias`` with numeric strings as keys; afterwards ``stop`` is a list
    and the keys are ints. ``validate`` checks ids against the vocabulary.
    """

    max_new_tokens: int | None = _param(
        None,
        f"Largest number of tokens to generate. If unset, {DEFAULT_MAX_NEW_TOKENS}, or fewer if the context has less "
        "room; a chat may use all the room.",
    )
    min_new_tokens: int = _param(0, "Number of tokens before which nothing ends the text.")
    temperature: float = _param(1.0, "Randomness: 0 always takes the most probable token.")
    top_p: float = _param(
        1.0,
        "Draw from the fewest tokens that have this total probability, in [0, 1]. 0 takes the most probable.",
    )
    top_k: int = _param(-1, "Draw from so many of the most probable tokens. -1 and 0 mean all.")
    min_p: float = _param(0.0, "Drop tokens less probable than this times the most probable one, in [0, 1].")
    frequency_penalty: float = _param(
        0.0, "Subtracted from a token's logit for each occurrence in the output, in [-2, 2]."
    )
    presence_penalty: float = _param(0.0, "Subtracted from the logits of tokens that occur in the output, in [-2, 2].")
    repetition_penalty: float = _param(
        1.0, "Makes tokens of prompt and output less probable if above 1, more probable if below."
    )
    logit_bias: dict[int, float] = field(
        default_factory=dict, metadata={"help": "Numbers added to the logits of these token ids."}
    )
    stop: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Strings that end the text, at most {MAX_STOP_STRINGS} of at most {MAX_STOP_CHARS} characters. "
            "They are searched in all that the model writes, special tokens included."
        },
    )
    bad_words: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Texts that are not generated, at most {MAX_BAD_WORDS} of at most {MAX_STOP_CHARS} characters."
        },
    )
    bad_words_ids: list[list[int]] = field(
        default_factory=list,
        metadata={"help": "The same as lists of token ids: the last id is banned after the others."},
    )
    allowed_token_ids: list[int] | None = _param(  # noqa: RUF009
        None, "Only these token ids are generated. If unset, all."
    )
    stop_token_ids: list[int] = field(default_factory=list, metadata={"help": "Token ids that end the text."})
    json_schema: str | dict[str, Any] | None = _param(  # noqa: RUF009
        None, "The text is JSON that this JSON schema allows."
    )
    regex: str | None = _param(None, "The whole text matches this regular expression.")
    ebnf: str | None = _param(None, "The text is a sentence of this grammar, in GBNF or in Lark.")
    structural_tag: str | dict[str, Any] | None = _param(  # noqa: RUF009
        None, "The text is free, but what begins like one of these tags follows its JSON schema to its end."
    )
    structured_outputs: dict[str, Any] | None = _param(  # noqa: RUF009
        None,
        "The same, as vLLM names it: an object with one of `json`, `regex`, `choice` (a list of texts), `grammar`, "
        "`json_object` and `structural_tag`.",
    )
    response_format: dict[str, Any] | None = _param(  # noqa: RUF009
        None,
        "The same, as OpenAI names it: an object with `type` `text`, `json_object`, `json_schema` or `structural_tag`.",
    )
    ignore_eos: bool = _param(False, "Go on after an end-of-sequence token.")
    include_stop_str_in_output: bool = _param(
        False,
        "Keep the stop string, or the token that ended the text if such tokens are shown.",
    )
    no_stop_trim: bool = _param(False, "Another name of include_stop_str_in_output.")
    skip_special_tokens: bool = _param(True, "Leave special tokens out of the text.")
    seed: int | None = _param(None, "Makes draws reproducible. If unset, each request gets another one.")
    n: int = _param(1, f"Completions of a prompt, at most {MAX_COMPLETIONS}, drawn with seeds seed, seed + 1, ...")

    def __post_init__(self) -> None:
        self.max_new_tokens = None if self.max_new_tokens is None else _int("max_new_tokens", self.max_new_tokens, 0)
        self.min_new_tokens = _int("min_new_tokens", self.min_new_tokens, 0)
        self.top_k = _int("top_k", self.top_k, -1)
        self.n = _int("n", self.n, 1, MAX_COMPLETIONS)
        self.seed = None if self.seed is None else _int("seed", self.seed, -(2**63), 2**64 - 1)
        self.temperature = _float("temperature", self.temperature, 0)
        self.top_p = _float("top_p", self.top_p, 0, 1)
        self.min_p = _float("min_p", self.min_p, 0, 1)
        self.frequency_penalty = _float("frequency_penalty", self.frequency_penalty, -2, 2)
        self.presence_penalty = _float("presence_penalty", self.presence_penalty, -2, 2)
        self.repetition_penalty = _float("repetition_penalty", self.repetition_penalty, 0, exclude_low=True)
        self.logit_bias = _logit_bias(self.logit_bias)
        self.stop = _texts("stop", self.stop, MAX_STOP_STRINGS)
        self.bad_words = _texts("bad_words", self.bad_words, MAX_BAD_WORDS)
        self.bad_words_ids = _bad_words_ids(self.bad_words_ids)
        self.allowed_token_ids = _allowed_token_ids(self.allowed_token_ids)
        self.stop_token_ids = token_ids("stop_token_ids", self.stop_token_ids)
        self.ignore_eos = _bool("ignore_eos", self.ignore_eos)
        self.no_stop_trim = _bool("no_stop_trim", self.no_stop_trim)
        includes_stop = _bool("include_stop_str_in_output", self.include_stop_str_in_output)
        self.include_stop_str_in_output = includes_stop or self.no_stop_trim
        self.skip_special_tokens = _bool("skip_special_tokens", self.skip_special_tokens)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequest(
                f"min_new_tokens ({self.min_new_tokens}) is larger than max_new_tokens ({self.max_new_tokens})",
                "min_new_tokens",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the parameters of a request's JSON object.

        Raises:
            InvalidRequest: a field is unknown (the message names the nearest, and all known ones), or wrong.
        """
        if not isinstance(values, Mapping):
            raise InvalidRequest(
                f"sampling_params must be an object of named values, not {_show(values)}", "sampling_params"
            )
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                nearest = get_close_matches(str(name), known, n=1)
                hint = f"did you mean {nearest[0]!r}? " if nearest else ""
                raise InvalidRequest(
                    f"unknown sampling parameter {name!r}; {hint}Known are: {', '.join(sorted(known))}", str(name)
                )
        return cls(**{name: value for name, value in values.items() if value is not None})

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidRequest if a token id lies outside ``[0, vocab_size)``."""
        check_vocabulary("logit_bias", self.logit_bias, vocab_size)
        check_vocabulary("stop_token_ids", self.stop_token_ids, vocab_size)
        check_vocabulary("allowed_token_ids", self.allowed_token_ids, vocab_size)
        for word in self.bad_words_ids:
            check_vocabulary("bad_words_ids", word, vocab_size)
        banned = {word[0] for word in self.bad_words_ids if len(word) == 1}
        if self.allowed_token_ids is not None and banned.issuperset(self.allowed_token_ids):
            raise InvalidRequest("allowed_token_ids has no token that bad_words leaves", "allowed_token_ids")
        if len(banned) == vocab_size:
            raise InvalidRequest("bad_words leaves no token of the vocabulary", "bad_words")

    @property
    def depends_on_output(self) -> bool:
        """Whether a draw depends on which tokens were generated before, beside the model's logits."""
        penalised = self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0
        return bool(penalised or self.bad_words_ids)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-6 or self.top_k == 1 or self.top_p == 0


def token_ids(name: str, values: Any) -> list[int]:
    """Return ``values`` as a list; raise InvalidRequest for anything but a list or tuple of integers (no bools)."""
    if not isinstance(values, (list, tuple)):
        raise InvalidRequest(f"{name} must be a list of token ids, not {_show(values)}", name)
    if all(type(value) is int for value in values):
        return list(values)
    return [_int(f"{name}[{i}]", value, param=name) for i, value in enumerate(values)]


def check_vocabulary(name: str, ids: Any, vocab_size: int) -> None:
    """Raise InvalidRequest naming the first of ``ids`` (a collection of ints) that the vocabulary does not have."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequest(
            f"{name} has token id {bad}, outside the vocabulary of {vocab_size} tokens (0 to {vocab_size - 1})",
            name,
        )


def _int(name: str, value: Any, low: int | None = None, high: int | None = None, param: str | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidRequest(f"{name} must be an integer, not {_show(value)}", param or name)
    number = int(value)
    most = MAX_INT if high is None else high
    if (low is not None and number < low) or number > most:
        wanted = f"at most {most}" if low is None else f"between {low} and {most}"
        wanted = f"at least {low}" if high is None and low is not None and number < low else wanted
        raise InvalidRequest(f"{name} must be {wanted}, not {_show(number)}", param or name)
    return number


def _float(name: str, value: Any, low: float, high: float = math.inf, exclude_low: bool = False) -> float:
    number = _finite(name, value)
    if number < low or number > high or (exclude_low and number == low):
        least = f"greater than {low}" if exclude_low else f"at least {low}"
        most = "" if high == math.inf else f" and at most {high}"
        raise InvalidRequest(f"{name} must be {least}{most}, not {value}", name)
    return number


def _finite(name: str, value: Any, param: str | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidRequest(f"{name} must be a number, not {_show(value)}", param or name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidRequest(f"{name} must be a finite number, not {_show(value)}", param or name)
    return number


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {_show(value)}", name)
    return value


def _texts(name: str, value: Any, most: int) -> list[str]:
    """Return a list of up to ``most`` texts; a single text need not be in a list."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, (list, tuple)):
        raise InvalidRequest(f"{name} must be a string or a list of strings, not {_show(value)}", name)
    if len(texts) > most:
        raise InvalidRequest(f"{name} has {len(texts)} strings; at most {most} are allowed", name)
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise InvalidRequest(f"{name}[{i}] must be a non-empty string, not {_show(text)}", name)
        if len(text) > MAX_STOP_CHARS:
            raise InvalidRequest(f"{name}[{i}] has {len(text)} characters; at most {MAX_STOP_CHARS} are allowed", name)
    return list(texts)


def _bad_words_ids(value: Any) -> list[list[int]]:
    name = "bad_words_ids"
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(f"{name} must be a list of lists of token ids, not {_show(value)}", name)
    if len(value) > 2 * MAX_BAD_WORDS:
        raise InvalidRequest(f"{name} has {len(value)} words; at most {2 * MAX_BAD_WORDS} are allowed", name)
    words = [token_ids(name, word) for word in value]
    if not all(0 < len(word) <= MAX_STOP_CHARS for word in words):
        raise InvalidRequest(f"{name}: a word has from 1 to {MAX_STOP_CHARS} token ids", name)
    return words


def _allowed_token_ids(value: Any) -> list[int] | None:
    ids = None if value is None else token_ids("allowed_token_ids", value)
    if ids == []:
        raise InvalidRequest("allowed_token_ids must have at least one token id", "allowed_token_ids")
    return ids


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"logit_bias must map token ids to numbers, not {_show(value)}", "logit_bias")
    return {_bias_key(key): _finite(f"logit_bias[{key!r}]", bias, "logit_bias") for key, bias in value.items()}


def _bias_key(key: Any) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= MAX_KEY_DIGITS:
        return int(key)
    return _int(f"the key {key!r} of logit_bias", key, param="logit_bias")


def _show(value: Any) -> str:
    """Return a wrong value for an error message: its type, and at most 40 characters of it."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"
