"""The choice of a compiler of grammars. Their libraries are loaded only where they are needed."""

from typing import Any, Protocol

from rtp_llm.srt.configs.grammar_backends import XGRAMMAR
from rtp_llm.srt.constrained.backend import GrammarBackend


class MakesBackend(Protocol):
    def __call__(self, tokenizer: Any, vocab_size: int, forces_tokens: bool = False) -> GrammarBackend:
        """See LLGuidanceBackend."""
        ...


def backend_class(name: str) -> MakesBackend:
    """Return the class of the compiler of this name (``--grammar-backend``)."""
    if name == XGRAMMAR:
        from rtp_llm.srt.constrained.xgrammar_backend import XGrammarBackend

        return XGrammarBackend
    from rtp_llm.srt.constrained.llguidance_backend import LLGuidanceBackend

    return LLGuidanceBackend
