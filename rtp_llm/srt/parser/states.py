"""States of a text in a grammar: in each, text is free up to what leads to another one."""

import json
from collections.abc import Sequence

from rtp_llm.srt.parser.rules import Rules, any_text, token_set, written

Lead = tuple[str, str]  # the text that ends a state, and the rules that follow it


class States:
    """Writes the rules of states.

    Args:
        rules: where.
        special_ids: all special tokens: those that lead nowhere may stand in any text.
    """

    def __init__(self, rules: Rules, special_ids: frozenset[int]) -> None:
        self._rules = rules
        self._special_ids = special_ids

    def define(self, name: str, leads: Sequence[Lead]) -> None:
        """Write the rule of a state."""
        choices, ids = self.leading("TEXT", "", leads)
        if others := self._special_ids - ids:
            choices.append(f"{self.before(leads, 'TEXT')} {token_set(others)} {name}")
        self._rules.define(name, " | ".join(["TEXT", *choices]))

    def leading(self, text: str, bar: str, leads: Sequence[Lead]) -> tuple[list[str], set[int]]:
        """Return the ways from a state to others, and the tokens that lead there.

        Args:
            text: the terminal of the state's text.
            bar: what it may not be, where that is not all of a terminal.
        """
        choices: list[str] = []
        ids: set[int] = set()
        for tag, follows in leads:
            parts = self._rules.parts(tag)
            first = next((i for i, part in enumerate(parts) if isinstance(part, int)), None)
            if first is None:
                lexeme = self._rules.terminal(f"(TEXT {json.dumps(tag)}){bar}")
                choices.append(f"{self._rules.rule(lexeme, '[lazy]')} {follows}")
                continue
            token_id = parts[first]
            assert isinstance(token_id, int)
            ids.add(token_id)  # words before it are text like any other
            before = text if text == "TEXT" else f"(SPACES | {text})"
            choices.append(f"{before} {written(parts[first:])} {follows}")
        return choices, ids

    def before(self, leads: Sequence[Lead], text: str) -> str:
        """Return the terminal of a text before a special token that leads nowhere: such a token may be invisible, and
        no tag may be put together around it."""
        tags = [tag for tag, _ in leads if all(isinstance(part, str) for part in self._rules.parts(tag))]
        begun = sorted({tag[:i] for tag in tags for i in range(1, len(tag))})
        return self._rules.terminal(f"{text} & ~(TEXT {any_text(begun)})") if begun else text
