"""The token ids that end a text: from the checkpoint's configuration, its tokenizer and its chat template.

A fine-tuned model often names its end of turn in one of these places only. They are read once, in the
tokenizer's process, and go to the core with each request.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rtp_llm.srt.chat.messages import ChatTemplateError
from rtp_llm.srt.conversation import Template
from rtp_llm.srt.managers.incremental_text import special_ids

logger = logging.getLogger(__name__)

CONFIG, TOKENIZER, CHAT_TEMPLATE = "config", "tokenizer", "chat template"
TOKENIZER_ENDS = ("eos_token", "eot_token")  # eot_token: an attribute that some tokenizers add
QUESTION, THOUGHT, ANSWER = "kangaroo4x", "umbrella9z", "xylophone7q"  # words that no template writes
HARMONY_CHANNEL = "<|channel|>"
HARMONY_MESSAGE_ENDS = ("<|end|>", "<|call|>")  # of a message, after which the turn may go on in another channel


@dataclass(frozen=True, slots=True)
class EndToken:
    """An id that ends a text unless ``ignore_eos`` is set, and its sources: ``config`` (config.json or
    generation_config.json), ``tokenizer``, ``chat template``."""

    token_id: int
    text: str | None  # None: there is no tokenizer
    sources: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.token_id, "text": self.text, "sources": list(self.sources)}

    def __str__(self) -> str:
        return f"{self.text or 'id'} ({self.token_id}: {', '.join(self.sources)})"


def find_end_tokens(
    config_ids: Iterable[int], vocab_size: int, tokenizer: Any, template: Template | None
) -> tuple[EndToken, ...]:
    """Return all end tokens, those of the configuration first. Ids outside the vocabulary are left out."""
    sources: dict[int, list[str]] = {}
    for source, ids in (
        (CONFIG, config_ids),
        (TOKENIZER, _of_tokenizer(tokenizer)),
        (CHAT_TEMPLATE, _of_template(template, tokenizer)),
    ):
        for token_id in dict.fromkeys(ids):
            if 0 <= token_id < vocab_size:
                sources.setdefault(token_id, []).append(source)
    return tuple(
        EndToken(token_id, None if tokenizer is None else tokenizer.decode([token_id]), tuple(names))
        for token_id, names in sources.items()
    )


def _of_tokenizer(tokenizer: Any) -> list[int]:
    if tokenizer is None:
        return []
    named = getattr(tokenizer, "special_tokens_map", {})  # tokenizers outside transformers may have none
    tokens = [str(named[name]) for name in TOKENIZER_ENDS if named.get(name)]
    vocabulary = _special_tokens(tokenizer)
    return [vocabulary[token] for token in tokens if token in vocabulary]


def _of_template(template: Template | None, tokenizer: Any) -> list[int]:
    if template is None or tokenizer is None:
        return []
    vocabulary = _special_tokens(tokenizer)
    try:
        token = end_of_turn(template, vocabulary)
    except ChatTemplateError as error:
        logger.debug("the chat template does not show how an answer ends: %s", error)
        return []
    return [] if token is None else [vocabulary[token]]


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return text -> id of the special tokens."""
    return {tokenizer.decode([token_id]): token_id for token_id in sorted(special_ids(tokenizer))}


def end_of_turn(template: Template, special_tokens: Iterable[str]) -> str | None:
    """Return the special token that a template writes after a finished answer, if it ends the turn; else None.

    Where another special token follows at once, the first may end a part of the turn only. A token that also begins
    the user's turn is no end, and neither is one that stands within an answer, such as the end of a message in the
    harmony format.

    Raises:
        ChatTemplateError: the template refuses the trial.
    """
    special = sorted(special_tokens, key=len, reverse=True)
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    before, found, after = _render(template, [question, answer]).rpartition(ANSWER)
    rest = after.lstrip()
    token = _first(rest, special)
    if not found or token is None or _first(rest.removeprefix(token), special):
        return None
    if HARMONY_CHANNEL in before and token in HARMONY_MESSAGE_ENDS:
        return None
    if _opens_question(template, token, special) or _is_within_answer(template, token):
        return None
    return token


def _render(template: Template, messages: list[dict[str, str]]) -> str:
    return template.prompt(messages, add_generation_prompt=False).text


def _opens_question(template: Template, token: str, special: list[str]) -> bool:
    """Return whether it is the special token next before the user's words, in the first turn and in a later one."""
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    try:
        first = _render(template, [question]).partition(QUESTION)[0]
        later = _render(template, [question, answer, question]).rpartition(QUESTION)[0].rpartition(ANSWER)[2]
    except ChatTemplateError:  # it shows finished conversations only
        return False
    return _last(first, special) == token == _last(later, special)


def _is_within_answer(template: Template, token: str) -> bool:
    """Return whether it ends the thoughts, after which the answer follows in the same turn."""
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    thoughtful = answer | {"thinking": THOUGHT, "reasoning_content": THOUGHT, "reasoning": THOUGHT}
    try:
        text = _render(template, [question, thoughtful])
    except ChatTemplateError:  # it takes no thoughts
        return False
    _, found, rest = text.partition(THOUGHT)
    return found != "" and token in rest.partition(ANSWER)[0]


def _first(text: str, tokens: list[str]) -> str | None:
    """Return the longest of ``tokens`` that ``text`` begins with."""
    return next((token for token in tokens if text.startswith(token)), None)


def _last(text: str, tokens: list[str]) -> str | None:
    """Return the one of ``tokens`` that stands last in ``text``."""
    ends = [(text.rfind(token) + len(token), token) for token in tokens if token in text]
    return max(ends)[1] if ends else None
