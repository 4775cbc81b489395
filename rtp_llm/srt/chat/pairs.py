"""From a query and a document to one text, for models that judge pairs in a text of a certain form.

A template is Jinja, as for chats: it sees ``messages`` of the roles ``query`` and ``document`` (before them ``system``,
if there is an instruction and the template names that role), and the variables ``instruct`` and ``instruction``. vLLM's
and sentence-transformers' templates for rerankers read the roles, SGLang's the order and ``instruct``.

It runs twice, when it is read, with marks in place of the texts; texts of requests are put where the marks were. So a
request runs no template, and what a template puts before a document is known.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from rtp_llm.srt.chat.messages import ChatTemplateError

QUERY, DOCUMENT, INSTRUCTION = "query", "document", "instruction"
_MARK = "mark7q-{}-mark7q"
_MARKS = re.compile(_MARK.format(f"({QUERY}|{DOCUMENT}|{INSTRUCTION})"))

# The texts of the models' publications, which they were trained with.
PAIR_TEMPLATES = {
    "qwen3-reranker": (
        "<|im_start|>system\n"
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n"
        "<Instruct>: {{ instruction or 'Given a web search query, retrieve relevant passages that answer the query' }}"
        "{{ '\\n' }}<Query>: {{ messages[-2].content }}{{ '\\n' }}<Document>: {{ messages[-1].content }}<|im_end|>\n"
        "<|im_start|>assistant\n"
        "<think>\n\n</think>{{ '\\n\\n' }}"
    ),
    "mxbai-rerank-v2": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
        "{% if instruction %}instruction: {{ instruction }}{{ '\\n' }}{% endif %}"
        "query: {{ messages[-2].content }}{{ '\\n' }}document: {{ messages[-1].content }}{{ '\\n' }}"
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\n"
        "Relevance:<|im_end|>\n"
        "<|im_start|>assistant{{ '\\n' }}"
    ),
    "bge-reranker-gemma": (
        "{{ bos_token }}A: {{ messages[-2].content }}{{ '\\n' }}B: {{ messages[-1].content }}{{ '\\n' }}"
        '{{ instruction or "Given a query A and a passage B, determine whether the passage contains an answer to the '
        "query by providing a prediction of either 'Yes' or 'No'.\" }}"
    ),
}


@dataclass(frozen=True, slots=True)
class PairText:
    """A pair as one text: what stands before the document, the document, and what stands behind it."""

    before: str
    document: str
    after: str


class PairTemplate:
    """A template for pairs. Thread-safe.

    Args:
        source: Jinja.
        special_tokens: variables that it sees, such as ``bos_token``.

    Raises:
        ChatTemplateError: it fails, or does not show a query and a document, each once and as it is.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any] | None = None) -> None:
        self._plain = _parts(source, special_tokens or {}, None)
        with_instruction = _parts(source, special_tokens or {}, INSTRUCTION)
        self._instructed = with_instruction if INSTRUCTION in with_instruction[1::2] else None
        self._opening = self._plain[0].partition("\n")[0]

    def text(self, query: str, document: str, instruction: str | None = None) -> PairText:
        """Return the text of a pair.

        A query that begins with the first line of a template that begins with a control token is taken to be written
        in its form already, and the document to be its end: clients of servers without templates send such.

        Raises:
            ChatTemplateError: there is an instruction, and the template has no place for one.
        """
        if self._opening.startswith("<") and query.startswith(self._opening):
            return PairText(query, document, "")
        if instruction is not None and self._instructed is None:
            raise ChatTemplateError("the model's template for pairs has no place for an instruction", INSTRUCTION)
        parts = self._plain if instruction is None or self._instructed is None else self._instructed
        texts = {QUERY: query, INSTRUCTION: instruction or ""}
        at = parts.index(DOCUMENT, 1)
        filled = [texts.get(part, "") if i % 2 else part for i, part in enumerate(parts)]
        return PairText("".join(filled[:at]), document, "".join(filled[at + 1 :]))


def is_for_pairs(source: str) -> bool:
    """Return whether a chat template names the roles of pairs, as those of sentence-transformers' rerankers do."""
    return all(re.search(rf"""["']{role}["']""", source) for role in (QUERY, DOCUMENT))


def _parts(source: str, special_tokens: Mapping[str, Any], instruction: str | None) -> list[str]:
    """Return literal texts, and between them the names of what stands there."""
    reason = ""
    for in_parts in (False, True):
        try:
            text = _render(source, special_tokens, instruction, in_parts)
        except Exception as error:  # a template may raise anything
            reason = reason or f": {type(error).__name__}: {' '.join(str(error).split())[:400]}"
            continue
        parts = _MARKS.split(text)
        if parts[1::2].count(QUERY) == parts[1::2].count(DOCUMENT) == 1:
            return parts
    raise ChatTemplateError(
        "the chat template is no template for pairs: it must show a message of the role query and one of the role "
        f"document, each once and as it is{reason}",
        "chat_template",
    )


def _render(source: str, special_tokens: Mapping[str, Any], instruction: str | None, in_parts: bool) -> str:
    """Run the template on marks. ``in_parts``: contents are lists of parts, as in models with media."""

    def message(role: str, name: str) -> dict[str, Any]:
        mark = _MARK.format(name)
        return {"role": role, "content": [{"type": "text", "text": mark}] if in_parts else mark}

    messages = [message(QUERY, QUERY), message(DOCUMENT, DOCUMENT)]
    variables = dict(special_tokens)
    if instruction is not None:
        mark = _MARK.format(instruction)
        variables |= {"instruct": mark, "instruction": mark}
        if re.search(r"""["']system["']""", source):
            messages.insert(0, message("system", instruction))
    texts, _ = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True, **variables
    )
    return texts[0]
