"""What the metadata of models with recurrent layers say."""

from typing import Any

import pytest

from rtp_llm.models_py.granitemoehybrid import GraniteMoeHybridForCausalLM
from rtp_llm.srt.gguf.form import declared_forms
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.gguf.recurrent import by_layer, kinds_of_layers, num_key_heads, state_head_dim


def metadata(**values: Any) -> dict[str, Any]:
    return {"general.architecture": "zeta", "zeta.block_count": 3} | {
        f"zeta.{key.replace('__', '.')}": value for key, value in values.items()
    }


def test_layers_with_key_heads_attend() -> None:
    said = metadata(attention__head_count_kv=[0, 4, 0])
    assert kinds_of_layers(said, "conv") == ["conv", "full_attention", "conv"]
    assert num_key_heads(said) == 4
    assert kinds_of_layers(metadata(attention__head_count_kv=2)) == ["full_attention"] * 3


def test_a_list_must_have_a_value_for_each_layer() -> None:
    with pytest.raises(GGUFError, match=r"`zeta\.attention\.head_count_kv` has 2 values, but there are 3 layers"):
        by_layer(metadata(attention__head_count_kv=[0, 4]), "attention.head_count_kv")


@pytest.mark.parametrize("number", [0, 5])
def test_heads_are_whole(number: int) -> None:
    assert state_head_dim(metadata(ssm__inner_size=48, ssm__time_step_rank=6)) == 8
    with pytest.raises(GGUFError, match=r"`zeta\.ssm\.inner_size` is 48, which are no whole heads"):
        state_head_dim(metadata(ssm__inner_size=48, ssm__time_step_rank=number))


def test_bamba_is_not_taken_for_granite() -> None:
    (form,) = declared_forms(GraniteMoeHybridForCausalLM)
    assert form.adapt
    with pytest.raises(GGUFError, match="Bamba"):
        form.adapt({"granitehybrid.rope.scaling.finetuned": True}, {})
