"""A vocabulary of bytes and some special tokens, for grammars without a model."""

from collections.abc import Iterator, Mapping

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = 256
FIRST_SPECIAL = 257


class ByteTokens:
    """Tokens 0 to 255 are bytes, 256 the end, then these special ones."""

    def __init__(self, special: tuple[str, ...] = ()) -> None:
        self.ids: Mapping[str, int] = {text: FIRST_SPECIAL + i for i, text in enumerate(special)}
        self.eos_token_id = END
        self.bos_token_id = None
        self.tokens = [bytes([i]) for i in range(256)] + [b"<end>", *(text.encode() for text in special)]
        self.special_token_ids = [END, *self.ids.values()]
        self._tokenizer = LLTokenizer(TokenizerWrapper(self))

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("texts only")
        return list(text.encode())

    def matcher(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        assert not matcher.is_error(), (matcher.get_error(), grammar)
        return matcher

    def encode(self, text: str) -> list[int]:
        return list(self._encoded(text))

    def _encoded(self, text: str) -> Iterator[int]:
        while text:
            special = next((item for item in self.ids if text.startswith(item)), None)
            yield from text[0].encode() if special is None else [self.ids[special]]
            text = text[1:] if special is None else text.removeprefix(special)

    def decode(self, ids: list[int], hidden: tuple[str, ...] = ()) -> str:
        left_out = {self.ids[text] for text in hidden} | {END}
        return b"".join(self.tokens[i] for i in ids if i not in left_out).decode()


def num_taken(tokens: ByteTokens, grammar: str, text: str) -> int | None:
    """Return how many of a text's tokens a grammar takes; None: all, and it may end there."""
    matcher, ids = tokens.matcher(grammar), tokens.encode(text)
    taken = int(matcher.try_consume_tokens(ids))
    return None if taken == len(ids) and matcher.is_accepting() else taken


def allowed_tokens(matcher: LLMatcher) -> list[int]:
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    return [int(i) for i in np.flatnonzero(bits)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer in which token i is byte i, and END ends a text."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))  # the characters that byte-level tokenizers write for the other bytes
    vocabulary = {chr(byte if byte in visible else next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
