"""A configuration that says something that a model file does not compute is refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from rtp_llm.srt.configs.requirements import require


def test_supported_values_and_missing_fields_pass() -> None:
    config: Any = SimpleNamespace(model_type="some", use_bias=False)
    require(config, "use_bias", (False,))
    require(config, "scoring_func", ("softmax", "sigmoid"))


def test_other_values_are_named() -> None:
    config: Any = SimpleNamespace(model_type="some", scoring_func="relu")
    with pytest.raises(ValueError, match=r"scoring_func='relu' is not supported for some; have \['softmax'\]"):
        require(config, "scoring_func", ("softmax",))
