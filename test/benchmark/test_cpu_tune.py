"""Where a way of computing ceases to be the faster one, and the table that says so."""

import re

import pytest

from benchmark import cpu_tune
from rtp_llm.srt.devices.cpu.build import ISAS


def test_the_limit_is_where_the_first_way_ceases_to_be_faster() -> None:
    assert cpu_tune.best_limit({1: 2.0, 2: 1.5, 4: 1.1, 8: 0.8, 16: 0.5}) == 4
    assert cpu_tune.best_limit({1: 2.0, 2: 0.98, 4: 1.5, 8: 0.8}) == 4  # one measurement hardly differs
    assert cpu_tune.best_limit({1: 0.9, 2: 0.5}) == 0
    assert cpu_tune.best_limit({1: 1.1, 2: 1.2}) == 2


def test_the_table_has_all_choices_of_all_instruction_sets() -> None:
    text = cpu_tune.TABLE.read_text(encoding="utf-8")
    enum = re.search(r"enum Choice \{(.*?)\};", text, re.DOTALL)
    assert enum is not None and tuple(re.findall(r"^    ([A-Z]\w+),", enum[1], re.MULTILINE)) == cpu_tune.CHOICES
    for isa in ISAS:
        changed = cpu_tune.with_limits(text, isa, [1, 2, 3, 4, 5])
        for other in ISAS:
            assert cpu_tune.limits_of(changed, other) == (
                [1, 2, 3, 4, 5] if other == isa else cpu_tune.limits_of(text, other)
            )
    with pytest.raises(ValueError, match="has 0 lines of neon"):
        cpu_tune.limits_of(text, "neon")
