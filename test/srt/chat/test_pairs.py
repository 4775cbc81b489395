"""Pairs of texts as one text: the forms that models were published with, and other servers' templates."""

import pytest

from rtp_llm.srt.chat.messages import ChatTemplateError
from rtp_llm.srt.chat.pairs import PAIR_TEMPLATES, PairTemplate, is_for_pairs

ROLES = (
    "{% for m in messages if m.role == 'system' %}S:{{ m.content }} {% endfor %}"
    "Q:{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }} "
    "D:{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }} A:"
)
ORDER = "I:{{ instruct | default('find') }} Q:{{ messages[0]['content'] }} D:{{ messages[1]['content'] }} A:"
PARTS = "Q:{{ messages[0].content[0].text }} D:{{ messages[1].content[0].text }}"


def whole(template: PairTemplate, query: str, document: str, instruction: str | None = None) -> str:
    made = template.text(query, document, instruction)
    return made.before + made.document + made.after


def test_qwen3_reranker_reads_what_its_authors_publish() -> None:
    template = PairTemplate(PAIR_TEMPLATES["qwen3-reranker"])
    start = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    end = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    task = "Given a web search query, retrieve relevant passages that answer the query"
    assert whole(template, "a?", "b") == f"{start}<Instruct>: {task}\n<Query>: a?\n<Document>: b{end}"
    assert whole(template, "a?", "b", "c") == f"{start}<Instruct>: c\n<Query>: a?\n<Document>: b{end}"
    written = f"{start}<Instruct>: {task}\n<Query>: a?\n"
    assert whole(template, written, f"<Document>: b{end}") == f"{written}<Document>: b{end}"


def test_other_rerankers_forms() -> None:
    mxbai = PairTemplate(PAIR_TEMPLATES["mxbai-rerank-v2"])
    assert "<|im_start|>user\nquery: a\ndocument: b\nYou are a search" in whole(mxbai, "a", "b")
    assert "<|im_start|>user\ninstruction: c\nquery: a\ndocument: b\nYou are" in whole(mxbai, "a", "b", "c")
    assert whole(mxbai, "a", "b").endswith("relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n")
    bge = PairTemplate(PAIR_TEMPLATES["bge-reranker-gemma"], {"bos_token": "<bos>"})
    assert whole(bge, "a", "b").startswith("<bos>A: a\nB: b\nGiven a query A and a passage B, determine whether")
    assert whole(bge, "a", "b", "c") == "<bos>A: a\nB: b\nc"


@pytest.mark.parametrize(
    ("source", "plain", "instructed"),
    [(ROLES, "Q:a D:b A:", "S:c Q:a D:b A:"), (ORDER, "I:find Q:a D:b A:", "I:c Q:a D:b A:"), (PARTS, "Q:a D:b", None)],
)
def test_templates_of_other_servers(source: str, plain: str, instructed: str | None) -> None:
    template = PairTemplate(source)
    made = template.text("a", "b")
    assert (made.before + "b" + made.after, made.before[-2:]) == (plain, "D:")
    if instructed is None:
        with pytest.raises(ChatTemplateError, match="no place for an instruction"):
            template.text("a", "b", "c")
    else:
        assert whole(template, "a", "b", "c") == instructed


def test_texts_of_requests_are_no_templates() -> None:
    texts = ("{{ messages }}", "{% raw %} mark7q-query-mark7q", "{# #}")
    assert whole(PairTemplate(ORDER), *texts) == "I:{# #} Q:{{ messages }} D:{% raw %} mark7q-query-mark7q A:"


@pytest.mark.parametrize(
    "source", ["Q:{{ messages[0].content }}", "{{ messages[5].content }}", "{{ messages | length }}"]
)
def test_templates_that_are_not_for_pairs_are_refused(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="no template for pairs"):
        PairTemplate(source)


def test_a_checkpoints_template_is_for_pairs_if_it_names_their_roles() -> None:
    assert is_for_pairs(ROLES) and not is_for_pairs(ORDER) and not is_for_pairs("{{ query }} {{ document }}")
