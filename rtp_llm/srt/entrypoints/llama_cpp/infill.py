"""Prompts that have a model fill in the middle of a text (Bavarian et al. 2022), of the tokens that it learned for it.

[repository, its name] [file, its name, text] ... [file, name] PREFIX prefix SUFFIX suffix MIDDLE
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rtp_llm.srt.managers.incremental_text import special_ids
from rtp_llm.srt.managers.tokenizer_manager import TokenizerManager

Encode = Callable[[str], list[int]]

# Names of the tokens, as models of different makers have them.
PREFIXES = ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
            "<|prefix|>")  # fmt: skip
SUFFIXES = ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
            "<|suffix|>")  # fmt: skip
MIDDLES = ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
           "<|middle|>")  # fmt: skip
REPOSITORIES = ("<|fim_repo|>", "<|repo_name|>", "<repo_name>", "<fim-repo>", "<REPO>", "<reponame>")
FILES = ("<|file_sep|>", "<file_sep>", "<|file_separator|>")
PADS = ("<|fim_pad|>", "<fim_pad>", "<fim-pad>", "<PAD>")

REPOSITORY_NAME, FILE_NAME = "myproject", "filename"
SNIPPET = "\n\n--- snippet ---\n\n"  # before another file's text, where there is no token for it


@dataclass(frozen=True, slots=True)
class FillTokens:
    """Ids of the tokens; of those that a model may lack, None."""

    prefix: int
    suffix: int
    middle: int
    repository: int | None
    file: int | None
    pad: int | None

    @property
    def ends(self) -> list[int]:
        """The ids by which a model says that nothing more is to be filled in, beside its own end tokens."""
        return [token_id for token_id in (self.repository, self.file, self.pad) if token_id is not None]


def find_fill_tokens(tokenizer: Any) -> FillTokens | None:
    """Return the tokens of transformers' tokenizer; None: the model has not learned to fill in."""

    def first(names: Iterable[str]) -> int | None:
        return next((token_id for name in names if (token_id := _id_of(tokenizer, name)) is not None), None)

    prefix, suffix, middle = map(first, (PREFIXES, SUFFIXES, MIDDLES))
    if prefix is None or suffix is None or middle is None:
        return None
    return FillTokens(prefix, suffix, middle, first(REPOSITORIES), first(FILES), first(PADS))


def _id_of(tokenizer: Any, name: str) -> int | None:
    """Return the id of the token of this name; None: there is none."""
    token_id = tokenizer.convert_tokens_to_ids(name)  # the unknown token's, if there is one
    is_known = token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == name
    return token_id if is_known else None


def fill_prompt(
    tokens: FillTokens, encode: Encode, prefix: str, suffix: str, extras: Sequence[tuple[str, str]]
) -> list[int]:
    """Return the prompt's ids, without those that every prompt of the model begins with.

    Args:
        encode: returns the ids of a text, in which names of special tokens are text (see ``PlainEncoder``).
        extras: (name, text) of other files.
    """
    ids = [] if tokens.repository is None else [tokens.repository, *encode(f"{REPOSITORY_NAME}\n")]
    for name, text in extras:
        ids += encode(SNIPPET) if tokens.file is None else [tokens.file, *encode(f"{name}\n")]
        ids += encode(text)
    if tokens.file is not None:
        ids += [tokens.file, *encode(f"{FILE_NAME}\n")]
    return [*ids, tokens.prefix, *encode(prefix), tokens.suffix, *encode(suffix), tokens.middle]


class PlainEncoder:
    """Encodes texts in which the names of special tokens, and of those for filling in, are nothing but text.

    A name is cut in two, and its parts are encoded by themselves.

    Args:
        tokenizer: of transformers.
        encode: returns the ids of a text, which may be special tokens.
    """

    def __init__(self, tokenizer: Any, encode: Encode) -> None:
        self._encode = encode
        known = (*PREFIXES, *SUFFIXES, *MIDDLES, *REPOSITORIES, *FILES, *PADS)
        names = {name for name in known if _id_of(tokenizer, name) is not None}
        names |= {tokenizer.convert_ids_to_tokens(token_id) for token_id in special_ids(tokenizer)}
        long = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, long))) if long else None

    def __call__(self, text: str) -> list[int]:
        if self._names is None:
            return self._encode(text)
        starts = [0, *(found.start() + 1 for found in self._names.finditer(text))]
        parts = (text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True))
        return [token_id for part in parts if part for token_id in self._encode(part)]


class Filler:
    """Makes prompts for filling in.

    Attributes:
        tokens: None: the model has not learned it.
        encode: see PlainEncoder.
        beginning: the token with which every prompt begins, if there is one.
    """

    def __init__(self, manager: TokenizerManager) -> None:
        tokenizer = manager.tokenizer
        self.tokens = find_fill_tokens(tokenizer)
        self.encode = PlainEncoder(tokenizer, lambda text: manager.encode(text, add_special_tokens=False))
        first = manager.encode("", is_prompt=False)[:1]
        self.beginning = first if first == [tokenizer.bos_token_id] else []
