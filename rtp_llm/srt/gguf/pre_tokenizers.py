"""The ways to cut text into words before byte-level BPE, by their names in ``tokenizer.ggml.pre``.

llama.cpp's converter recognises a Hugging Face tokenizer by the ids that it gives a test text, and stores a name; the
names, and what each means, are listed in llama.cpp's ``src/llama-vocab.cpp``. Where llama.cpp had to simplify a
tokenizer's expression (its engine has no classes of capitals, no sets within sets and no case-insensitive groups), the
tokenizer's own expression stands here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers

# Steps that are not expressions to split at:
BYTES = "bytes"  # text to byte symbols, cut at GPT-2's words
DIGITS = "digits"  # each digit by itself
NUMBERS = "numbers"  # runs of digits
PUNCTUATION = "punctuation"  # runs of punctuation

_STEPS: Mapping[str, Callable[[], Any]] = {
    BYTES: lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    DIGITS: lambda: pre_tokenizers.Digits(individual_digits=True),
    NUMBERS: lambda: pre_tokenizers.Digits(individual_digits=False),
    PUNCTUATION: lambda: pre_tokenizers.Punctuation("contiguous"),
}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(numbers: str, contractions: str = _CONTRACTIONS + "|") -> str:
    """The expression of GPT-4 (cl100k) and its kin: a word with what stands before it, numbers, punctuation, spaces."""
    return rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(numbers: str, contractions: str, end: str = r"[\r\n/]*", other: str = "") -> str:
    """The expression of GPT-4o (o200k) and its kin: words end before a capital. ``other``: letters left out."""
    upper, lower = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{other}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{other}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{upper}*{lower}+{contractions}|{before}{upper}+{lower}*{contractions}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+{end}|{_SPACES}"
    )


_GPT2 = (BYTES,)
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS_GPT2 = (DIGITS, BYTES)
_GPT4 = (_words(r"\p{N}{1,3}"),)
_QWEN2 = (_words(r"\p{N}"),)
_GPT4O = (_cased_words(r"\p{N}{1,3}", _CONTRACTIONS + "?"),)
_BLOOM = r" ?[^(\s|.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c" + r")]+"
_KANA_AND_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK_WORDS = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_DEEPSEEK_V3 = (r"\p{N}{1,3}", _KANA_AND_HAN, _DEEPSEEK_WORDS)
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters that have two cases, of Unicode 11.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_NUMBERS_FROM_THE_END = r"\d{1,3}(?=(?:\d{3})*\b)"  # threes, counted from the number's end
_SPACES_BY_HALVES = "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
_LINES = r"[^\n]+|[\n]+"


@dataclass(frozen=True)
class PreTokenization:
    """How text is made into words.

    ``steps``: regular expressions (of Oniguruma) at whose matches text is cut, one after the other, or names of steps.
    ``nfc``: text is normalised to NFC first. ``whole_words``: a word that is a token needs no merges. ``add_bos``: the
    default. ``in_bytes``: the tokens are spelled in byte symbols; otherwise in characters, with ▁ for spaces.
    """

    steps: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False
    in_bytes: bool = True

    def normalizer(self) -> Any:
        if not self.in_bytes:
            return normalizers.Replace(" ", "▁")
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> Any:
        steps = [_STEPS[step]() if step in _STEPS else _split(step) for step in self.steps]
        if self.in_bytes and BYTES not in self.steps:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)


def _split(expression: str) -> Any:
    return pre_tokenizers.Split(Regex(expression), "isolated")


def _named(names: str, *steps: str, **options: bool) -> dict[str, PreTokenization]:
    return dict.fromkeys(names.split(), PreTokenization(steps, **options))


DEFAULT = PreTokenization((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"))

PRE_TOKENIZATIONS: Mapping[str, PreTokenization] = {
    "default": DEFAULT,
    **_named(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        *_GPT4,
        whole_words=True,
        add_bos=True,
    ),
    **_named("dbrx smaug-bpe chatglm-bpe", *_GPT4),
    **_named("glm4 glm5", *_GPT4, whole_words=True),
    **_named("minicpm5", r"\p{N}{1,3}", _words(r"\p{N}+"), whole_words=True),
    **_named(
        "jais-2",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
        rf"|{_SPACES_BY_HALVES}|\s",
    ),
    **_named(
        "deepseek-llm",
        "[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _DEEPSEEK_HAN,
        r"\p{N}+",
    ),
    **_named("deepseek-coder", "[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, DIGITS),
    **_named("deepseek-v3 hunyuan-dense joyai-llm hy_v4", *_DEEPSEEK_V3),
    **_named(
        "spark2_5",
        r"\p{N}{1,3}",
        _KANA_AND_HAN,
        rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
        r"\p{N}",
    ),
    **_named(
        "youtu",
        "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
        "|[\u3105-\u312f]+|" + _KANA_AND_HAN,
        _cased_words(r"\p{N}", _CONTRACTIONS + "?"),
        whole_words=True,
    ),
    **_named("falcon", PUNCTUATION, BYTES, NUMBERS, "[0-9][0-9][0-9]"),
    **_named("starcoder refact smollm codeshell exaone minerva-7b mellum2", *_DIGITS_GPT2),
    **_named("command-r", *_DIGITS_GPT2, nfc=True),
    **_named(
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe a.x-4.0 mellum "
        "exaone4 jais trillion granite-docling",
        *_GPT2,
    ),
    **_named("mpt olmo modern-bert", *_GPT2, nfc=True),
    **_named("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2", *_QWEN2, nfc=True),
    **_named("hunyuan solar-open grok-2", *_QWEN2),
    **_named("ufakzeka", _words(r"\p{N}", contractions="")),
    **_named(
        "qwen35",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        rf"|{_SPACES}",
        nfc=True,
    ),
    **_named("poro-chat bloom gpt3-finnish", _BLOOM),
    **_named("viking", _BLOOM, DIGITS),
    **_named("tekken", _cased_words(r"\p{N}", ""), whole_words=True, add_bos=True),
    **_named(
        "chameleon",
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        DIGITS,
        r"[\p{P}!-/:-@\[-`{-~]",
        BYTES,
        add_bos=True,
    ),
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", *_GPT4O),
    **_named("granite-embed-multi-97m", *_GPT4O, whole_words=True),
    **_named("tiny_aya cohere2moe", _NUMBERS_FROM_THE_END, *_GPT4O),
    **_named(
        "kimi-k2",
        r"\p{Han}+|" + _cased_words(r"\p{N}{1,3}", _CONTRACTIONS + "?", end=r"[\r\n]*", other=r"&&[^\p{Han}]"),
    ),
    **_named("superbpe", r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    **_named(
        "bailingmoe bailingmoe2 llada-moe",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    **_named(
        "seed-coder",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
    ),
    **_named(
        "afmoe",
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
        "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
        "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
        _DEEPSEEK_WORDS,
    ),
    **_named("laguna", _LINES, *_QWEN2),
    **_named(
        "exaone-moe",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    **_named("gemma4 granite-embed-multi-311m", _LINES, add_bos=True, in_bytes=False),
    **_named("sarvam-moe", _LINES, in_bytes=False),
}
