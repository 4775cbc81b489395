"""Tokens whose logits at the end of a pair are its score: which a checkpoint, or who serves it, names.

Rerankers that are language models answer "yes" or "no" (Qwen3-Reranker, 2025), "1" or "0" (mxbai-rerank-v2, 2025), or
"Yes" (bge-reranker-v2-gemma, 2024). They are named by

    modules.json            a module LogitScore, of sentence-transformers, with ids
    classifier_from_token   in config.json, or in its overrides as vLLM has them: ["no", "yes"], texts or ids
    method                  beside it: "from_2_way_softmax" for two tokens that exclude each other, or
                            "no_post_processing" for a label each; is_original_qwen3_reranker means the first
"""

from dataclasses import dataclass
from typing import Any

from rtp_llm.srt.configs.sentence_transformers import SentenceTransformer

TWO_WAYS, ALONE = "from_2_way_softmax", "no_post_processing"
NO_YES = ("no", "yes")
# Templates for pairs (srt/chat/pairs.py) of models that are known by their tokens.
TEMPLATE_OF: dict[tuple[str | int, ...], str] = {
    NO_YES: "qwen3-reranker",
    ("0", "1"): "mxbai-rerank-v2",
    ("Yes",): "bge-reranker-gemma",
}


class ScoreTokensError(ValueError):
    """The tokens of scores are not named as they must be."""


@dataclass(frozen=True, slots=True)
class ScoreTokens:
    """``tokens``: texts or ids. ``excludes``: there are two, of which the second means that a pair fits and the first
    that it does not: its score is the second one's share of both probabilities. Else each is a label."""

    tokens: tuple[str | int, ...]
    excludes: bool

    @property
    def template(self) -> str | None:
        """The name of the template for pairs that goes with such tokens, if there is one."""
        return TEMPLATE_OF.get(self.tokens)


def score_tokens(config: Any, sentences: SentenceTransformer | None, convert: str) -> ScoreTokens | None:
    """Return the tokens of a model's scores; None if it has none.

    Args:
        config: of transformers, with overrides.
        convert: see ServerArgs; of ``score`` without named tokens they are "no" and "yes".

    Raises:
        ScoreTokensError: they are named in another form.
    """
    if convert not in ("auto", "score"):
        return None
    named = getattr(config, "classifier_from_token", None)
    method = getattr(config, "method", None)
    if named is None:
        if sentences is not None and sentences.score_ids:
            return ScoreTokens(sentences.score_ids, len(sentences.score_ids) == 2)
        return ScoreTokens(NO_YES, True) if convert == "score" else None
    if not isinstance(named, list) or not named or not all(_is_token(token) for token in named):
        raise ScoreTokensError(f"classifier_from_token must be a list of tokens, texts or ids, not {named!r}")
    if method is None and (getattr(config, "is_original_qwen3_reranker", False) or len(named) == 2):
        method = TWO_WAYS
    if method not in (None, TWO_WAYS, ALONE):
        raise ScoreTokensError(f"method must be {TWO_WAYS!r} or {ALONE!r}, not {method!r}")
    if method == TWO_WAYS and len(named) != 2:
        raise ScoreTokensError(f"{TWO_WAYS} is for two tokens, and classifier_from_token has {len(named)}")
    return ScoreTokens(tuple(named), method == TWO_WAYS)


def _is_token(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)
