"""The tokenizer in a GGUF's metadata, written as the files of a Hugging Face checkpoint.

Its ids are those of the tokenizer that the file was made of, as far as the metadata says. Kinds: ``gpt2`` (byte-level
BPE), ``llama`` (sentencepiece's BPE), ``gemma4`` (BPE in characters), ``t5`` (sentencepiece's unigrams), ``bert``
(WordPiece).
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.pre_tokenizers import DEFAULT, PRE_TOKENIZATIONS, PreTokenization
from rtp_llm.srt.gguf.vocabulary import (
    CHARSMAP_KEY,
    MERGES_KEY,
    PRE_KEY,
    SCORES_KEY,
    SPECIAL_KEYS,
    TOKENS_KEY,
    Vocabulary,
    read_vocabulary,
)

logger = logging.getLogger(__name__)

TEMPLATE_KEY = "tokenizer.chat_template"
_SPACE = "▁"
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # as transformers names them, with _token
_ADDED = {"llama": ["bos"], "gemma4": ["bos"], "t5": ["eos"]}  # by llama.cpp, if not said
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LONGEST_MERGED = 512  # characters
_NEVER = -1e6  # the score of unigrams that are not matched with text
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]+")
# Where llama.cpp strips spaces beside special tokens, as the original tokenizers do, which the format cannot say.
_LEFT_STRIPPED = {"jina-v2-de": "<mask>", "jina-v2-es": "<mask>", "jina-v2-code": "<mask>", "modern-bert": "[MASK]"}
_PHI3 = re.compile(r"phi[- ]?3", re.IGNORECASE)
_PHI3_UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat templates of a GGUF's metadata to a folder.

    Raises:
        GGUFError: a key is missing or wrong, or the tokenizer is of a kind that is not supported; the message names the
            key.
    """
    vocabulary = read_vocabulary(metadata)
    tokenizer = make_tokenizer(vocabulary, str(metadata.get("general.name", "")))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = _settings(vocabulary)
    settings["added_tokens_decoder"] = _named_tokens(tokenizer, {settings.get(f"{name}_token") for name in _NAMED})
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    for name, template in _chat_templates(metadata).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")


def _named_tokens(tokenizer: Tokenizer, names: Set[str | None]) -> dict[int, dict[str, Any]]:
    """Return what tokenizer_config.json says of the tokens that it names, by id. Without that, transformers parses all
    of tokenizer.json in Python, beside the library that reads it: seconds and 150 MB for 262,144 tokens."""
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        token_id: {name: getattr(token, name) for name in fields}
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.content in names
    }


def make_tokenizer(vocabulary: Vocabulary, model_name: str = "") -> Tokenizer:
    """Make a tokenizer of the ``tokenizers`` library.

    Args:
        model_name: ``general.name``; some models' special tokens are known by it to strip spaces beside them.

    Raises:
        GGUFError: the vocabulary is not one of its kind.
    """
    tokenizer = _BUILDERS[vocabulary.kind](vocabulary)
    _add_tokens(tokenizer, vocabulary, model_name)
    tokenizer.post_processor = _post_processor(vocabulary)
    return tokenizer


def _bpe(vocabulary: Vocabulary) -> Tokenizer:
    """``gpt2`` and ``gemma4``: pairs of tokens are merged within words."""
    way = pre_tokenization(vocabulary)
    if vocabulary.merges is None:
        raise GGUFError(f"{MERGES_KEY} is missing")
    unknown = None if way.in_bytes else _token(vocabulary, "unk")
    tokenizer = Tokenizer(
        models.BPE(
            dict(vocabulary.ids),
            list(vocabulary.merges),
            unk_token=unknown,
            fuse_unk=not way.in_bytes,
            byte_fallback=not way.in_bytes,
            ignore_merges=way.whole_words,
        )
    )
    tokenizer.normalizer = way.normalizer()
    tokenizer.pre_tokenizer = way.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel() if way.in_bytes else _sentencepiece_decoder(has_prefix=False)
    return tokenizer


def pre_tokenization(vocabulary: Vocabulary) -> PreTokenization:
    """Return how a BPE vocabulary's text is cut into words.

    Raises:
        GGUFError: ``tokenizer.ggml.pre`` is unknown.
    """
    name = "gemma4" if vocabulary.kind == "gemma4" else vocabulary.pre
    if name is None:
        logger.warning("%s is missing: words are cut by default rules, which may not be this model's", PRE_KEY)
        return DEFAULT
    if name not in PRE_TOKENIZATIONS:
        raise GGUFError(f"{PRE_KEY} {name!r} is not known; known are {', '.join(sorted(PRE_TOKENIZATIONS))}")
    return PRE_TOKENIZATIONS[name]


def _sentencepiece_bpe(vocabulary: Vocabulary) -> Tokenizer:
    """``llama``: the pair of neighbours whose joint token has the best score is merged first."""
    if vocabulary.merges is None and not vocabulary.scores:
        raise GGUFError(f"{SCORES_KEY} is missing")
    tokenizer = Tokenizer(
        models.BPE(
            dict(vocabulary.ids),
            merges_by_score(vocabulary) if vocabulary.merges is None else list(vocabulary.merges),
            unk_token=_token(vocabulary, "unk"),
            fuse_unk=True,
            byte_fallback=_has_bytes(vocabulary),
        )
    )
    has_prefix = vocabulary.flags.get("add_space_prefix", True)
    _set_sentencepiece_text(tokenizer, vocabulary, has_prefix)
    return tokenizer


def merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the pairs of tokens that form another, the best score of the result first, then the first of the
    results, as sentencepiece merges. Tokens of more than 512 characters are not merged: none are so long, and a file
    of long ones would take minutes."""
    mergeable = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    tokens = vocabulary.tokens
    ids = {tokens[token_id]: token_id for token_id in vocabulary.of_types(*mergeable)}
    pairs = []
    for token, token_id in ids.items():
        for cut in range(1, len(token) if len(token) <= _LONGEST_MERGED else 1):
            left = ids.get(token[:cut])
            if left is not None and (right := ids.get(token[cut:])) is not None:
                pairs.append((-vocabulary.scores[token_id], token_id, left, right))
    return [(tokens[left], tokens[right]) for *_, left, right in sorted(pairs)]


def _unigram(vocabulary: Vocabulary) -> Tokenizer:
    """``t5``: the most probable way to cut a text into tokens."""
    if not vocabulary.scores:
        raise GGUFError(f"{SCORES_KEY} is missing")
    if "unk" not in vocabulary.special:
        raise GGUFError(f"{SPECIAL_KEYS['unk']} is missing")
    scored = list(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    for token_id in vocabulary.of_types(TokenType.BYTE):
        scored[token_id] = vocabulary.tokens[token_id], _NEVER
    tokenizer = Tokenizer(models.Unigram(scored, vocabulary.special["unk"], _has_bytes(vocabulary)))
    is_squeezed = vocabulary.flags.get("remove_extra_whitespaces", False)
    _set_sentencepiece_text(tokenizer, vocabulary, vocabulary.flags.get("add_space_prefix", False) or is_squeezed)
    return tokenizer


def _set_sentencepiece_text(tokenizer: Tokenizer, vocabulary: Vocabulary, has_prefix: bool) -> None:
    """Set how text is normalised. Each part of a text that special tokens separate gets the prefix, as in llama.cpp."""
    steps: list[Any] = []
    if vocabulary.charsmap:
        try:
            steps.append(normalizers.Precompiled(vocabulary.charsmap))
        except Exception as error:  # the library raises no narrower one
            raise GGUFError(f"{CHARSMAP_KEY} is damaged: {error}") from error
    if vocabulary.flags.get("remove_extra_whitespaces", False):
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if has_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = _sentencepiece_decoder(has_prefix)


def _sentencepiece_decoder(has_prefix: bool) -> Any:
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)


def _word_piece(vocabulary: Vocabulary) -> Tokenizer:
    """``bert``: the longest tokens from a word's start on. The format marks tokens that begin a word, Hugging Face's
    files those that do not."""
    unknown = _token(vocabulary, "unk")
    if unknown is None:
        raise GGUFError(f"{SPECIAL_KEYS['unk']} is missing")
    marked = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED, TokenType.UNUSED)
    ids: dict[str, int] = {}
    for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        is_whole = kind in marked or token_id in vocabulary.special.values()
        text = token if is_whole else token[1:] if token.startswith(_SPACE) else f"##{token}"
        if text in ids:
            raise GGUFError(f"{TOKENS_KEY} has {text!r} twice, as ids {ids[text]} and {token_id}")
        ids[text] = token_id
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown))
    lowercase = vocabulary.flags.get("normalizer.lowercase", True)
    strip_accents = vocabulary.flags.get("normalizer.strip_accents", lowercase)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##")
    return tokenizer


def _has_bytes(vocabulary: Vocabulary) -> bool:
    return all(token in vocabulary.ids for token in _BYTES)


def _token(vocabulary: Vocabulary, name: str) -> str | None:
    """Return the text of bos, eos, ...; None if there is no such token."""
    token_id = vocabulary.special.get(name)
    return None if token_id is None else vocabulary.tokens[token_id]


def _adds(vocabulary: Vocabulary, name: str) -> bool:
    """Return whether bos or eos is put around a text, by the file or else by llama.cpp's defaults. BERT's text is
    always between [CLS] and [SEP]."""
    if vocabulary.kind == "bert":
        return True
    if vocabulary.kind == "gpt2":
        default = ["bos"] if vocabulary.pre and pre_tokenization(vocabulary).add_bos else []
    else:
        default = _ADDED[vocabulary.kind]
    return vocabulary.flags.get(f"add_{name}_token", name in default)


def _post_processor(vocabulary: Vocabulary) -> Any:
    """Put bos, or BERT's [CLS], before each text and eos, or [SEP], after it."""
    is_bert = vocabulary.kind == "bert"
    first = ("cls" if "cls" in vocabulary.special else "bos") if is_bert else "bos"
    names = [(first, "bos"), ("sep" if is_bert else "eos", "eos")]
    used = {}
    for name, flag in names:
        if _adds(vocabulary, flag):
            if name not in vocabulary.special:
                raise GGUFError(f"{SPECIAL_KEYS[name]} is missing, and the token is to be put around a text")
            used[flag] = str(_token(vocabulary, name)), vocabulary.special[name]
    start, end = ([used[flag][0]] if flag in used else [] for flag in ("bos", "eos"))
    single = [*start, "$A", *end]
    pair = [f"{part}:0" for part in single] + [f"{part}:1" for part in ([] if is_bert else start) + ["$B", *end]]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(used.values()))


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary, model_name: str) -> None:
    """Add the tokens that are one wherever their text stands: control tokens, which decoding can skip, and those that
    the model's makers defined, which are text."""
    special = {*vocabulary.of_types(TokenType.CONTROL, TokenType.UNKNOWN), *_named_ids(vocabulary).values()}
    is_phi3 = vocabulary.kind == "llama" and _PHI3.search(model_name) is not None
    added = []
    for token_id in sorted({*special, *vocabulary.of_types(TokenType.USER_DEFINED)}):
        text = vocabulary.tokens[token_id]
        added.append(
            AddedToken(
                text,
                lstrip=_LEFT_STRIPPED.get(vocabulary.pre or "") == text,
                rstrip=is_phi3 and text not in _PHI3_UNSTRIPPED,
                normalized=False,
                special=token_id in special,
            )
        )
    tokenizer.add_tokens(added)


def _named_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Return the special tokens that tokenizer_config.json names. One that is text by its type is not named, or text
    would vanish, unless it ends texts or is put before them."""
    ids = {name: vocabulary.special[name] for name in _NAMED if name in vocabulary.special}
    needed = {"eos"} | ({"bos"} if _adds(vocabulary, "bos") else set())
    for name in [name for name in ids if name not in needed]:
        if vocabulary.types[ids[name]] in (TokenType.NORMAL, TokenType.BYTE):
            logger.warning(
                "%s %d is the token %r of text: ignored", SPECIAL_KEYS[name], ids[name], _token(vocabulary, name)
            )
            del ids[name]
    return ids


def _settings(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of tokenizer_config.json."""
    named = _named_ids(vocabulary)
    if vocabulary.kind == "bert":
        named = {"cls": named["bos"]} | named if "bos" in named else named
        named = {name: token_id for name, token_id in named.items() if name not in ("bos", "eos")}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # the model's configuration has it
        "fix_mistral_regex": False,  # else transformers suspects the expressions of all Mistral models
    }
    if vocabulary.kind != "bert":
        settings |= {f"add_{name}_token": _adds(vocabulary, name) for name in ("bos", "eos")}
    return settings | {f"{name}_token": vocabulary.tokens[token_id] for name, token_id in named.items()}


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates' files: the default one's, and those of named ones."""
    files: dict[str, str] = {}
    for key, template in metadata.items():
        if key != TEMPLATE_KEY and not key.startswith(f"{TEMPLATE_KEY}."):
            continue
        if not isinstance(template, str):
            raise GGUFError(f"{key} must be of type str, not {type(template).__name__}")
        if key == TEMPLATE_KEY:
            files |= {"chat_template.jinja": template} if template else {}
            continue
        name = key.removeprefix(f"{TEMPLATE_KEY}.")
        if not _TEMPLATE_NAME.fullmatch(name):
            raise GGUFError(f"{key!r} does not name a chat template: letters, digits, - and _ are allowed")
        files[f"additional_chat_templates/{name}.jinja"] = template
    return files


_BUILDERS: Mapping[str, Callable[[Vocabulary], Tokenizer]] = {
    "gpt2": _bpe,
    "gemma4": _bpe,
    "llama": _sentencepiece_bpe,
    "t5": _unigram,
    "bert": _word_piece,
}
