"""Variables by which a request could make a template take all memory there is."""

from typing import Any

import pytest

from rtp_llm.srt.chat.template import ChatTemplate, ChatTemplateError
from rtp_llm.srt.chat.template_sizes import INDENTING, REPEATING, size_variables

MESSAGES = [{"role": "user", "content": "hi"}]
SAYS = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("{{ messages | tojson(indent=n) }}", 10**9),
        ("{{ messages | tojson(n) }}", 65),
        ("{{ messages | tojson(indent=n) }}", " " * 65),
        ("{{ 'a' | indent(n) }}", 10**9),
        ("{{ 'x' * n }}", 10**9),
        ("{{ n * [1] }}", 10**9),
        ("{{ 10 ** n }}", 10**9),
        ("{{ n % 1 }}", "%1000000000s" * 1000),
        ("{{ n | format(1) }}", "%1000000000s" * 1000),
        ("{{ n.format(1) }}", "{:1000000000}" * 1000),
        ("{{ 'a' | center(n) }}", 10**9),
        ("{{ 'a'.ljust(n) }}", 10**9),
        ("{% set m = n + 1 %}{{ 'x' * m }}", 10**9),
        ("{% set ns = namespace(k=0) %}{% set ns.k = n %}{{ 'x' * ns.k }}", 10**9),
        ("{% macro f(k) %}{{ 'x' * k }}{% endmacro %}{{ f(n) }}", 10**9),
        ("{% macro f(k=n) %}{{ 'x' * k }}{% endmacro %}{{ f() }}", 10**9),
        ("{% for k in [n] %}{{ 'x' * k }}{% endfor %}", 10**9),
        ("{% generation %}{{ 'x' * n }}{% endgeneration %}", 10**9),
        ("{{ 'x' * n[0] }}", [10**9]),
    ],
)
def test_a_size_is_small(body: str, value: Any) -> None:
    with pytest.raises(ChatTemplateError, match="uses 'n' as a size") as refused:
        ChatTemplate(SAYS + body).prompt(MESSAGES, chat_template_kwargs={"n": value})
    assert refused.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("body", "value", "text"),
    [
        ("{{ 'x' * n }}", 3, "hixxx"),
        ("{{ {'a': 1} | tojson(indent=n) }}", 1, 'hi{\n "a": 1\n}'),
        ("{{ n }}{{ 'x' * 2 }}", 10**9, f"hi{10**9}xx"),
        ("{{ n }}", "long" * 1000, "hi" + "long" * 1000),
    ],
)
def test_all_else_is_free(body: str, value: Any, text: str) -> None:
    assert ChatTemplate(SAYS + body).prompt(MESSAGES, chat_template_kwargs={"n": value}).text == text


def test_published_templates_can_be_read(data_dir: Any) -> None:
    for path in sorted((data_dir / "chat-templates").glob("*.jinja")):
        for sizing in (REPEATING, INDENTING):
            assert "enable_thinking" not in size_variables(path.read_text(), sizing), path.name
