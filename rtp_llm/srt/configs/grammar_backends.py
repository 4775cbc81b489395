"""The compilers of grammars, by name."""

from importlib.util import find_spec

LLGUIDANCE, XGRAMMAR = "llguidance", "xgrammar"
GRAMMAR_BACKENDS = (LLGUIDANCE, XGRAMMAR)


def missing_package(name: str) -> str | None:
    """Return what is to be installed for a compiler; None: nothing."""
    return "rtp-llm[xgrammar]" if name == XGRAMMAR and find_spec(XGRAMMAR) is None else None
