"""A file of all usual parts: what comes out is one file of ours, whatever its classes are called."""

import ast
import re
from pathlib import Path

import pytest

from rtp_llm.port import porter
from rtp_llm.port.porter import port
from rtp_llm.port.source import PortError


def imported(text: str) -> set[str]:
    tops = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops.add((node.module or ".").split(".")[0])
    return tops


def test_the_output_imports_torch_transformers_and_rtp_llm_only(ported, whole_model):
    result = ported(whole_model)
    assert imported(result.text) == {"torch", "transformers", "rtp_llm"}
    assert result.report.is_complete
    assert "vllm" not in result.text


def test_constructors_calls_and_the_end_of_forward(ported, whole_model):
    text = ported(whole_model).text
    for expected in (
        "def __init__(self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str",
        "self.model = BoatModel(config=config, quant_config=quant_config, prefix=add_prefix(",
        "lambda idx, prefix: BoatLayer(config, quant_config, prefix=prefix)",
        "out = self.attn(q, k, v, forward_batch)  # over the cache",
        "for layer in self.layers:",
        "hidden_states, residual = layer(positions, hidden_states, residual, forward_batch",
        "self.lm_head = self.model.embed_tokens",
        "self.logits_processor = LogitsProcessor(config)",
        "window=model_window(config)",
        "layer_id=extract_layer_index(prefix)",
        'rename = [(r"^hull\\.", "model.")]',
        '"qkv_proj": ["q_proj", "k_proj", "v_proj"]',
        "def get_input_embeddings(self) -> nn.Module:",
        "EntryClass = BoatForCausalLM",
    ):
        assert expected in re.sub(r"\(\n\s+", "(", text).replace(",\n        ", ", "), f"{expected}\n\n{text}"


def test_comments_and_docstrings_survive(ported, whole_model):
    text = ported(whole_model).text
    assert "# scores are scaled as usual" in text
    assert '"""Attention whose heads share nothing."""' in text


def test_nothing_of_the_other_engine_is_left_in_names(ported, whole_model):
    names = {node.id for node in ast.walk(ast.parse(ported(whole_model).text)) if isinstance(node, ast.Name)}
    assert not names & {"get_pp_group", "PPMissingLayer", "IntermediateTensors", "vllm_config", "cache_config"}


def test_renaming_every_class_renames_the_result_and_changes_nothing_else(ported, whole_model):
    renamed = re.sub(r"\bBoat(\w+)", lambda match: f"Qx{match[1][::-1]}Zz", whole_model)
    names = {f"Qx{part[::-1]}Zz": f"Boat{part}" for part in re.findall(r"\bBoat(\w+)", whole_model)}
    text = ported(renamed).text
    for new, old in names.items():
        text = text.replace(new, old)
    assert text == ported(whole_model).text


def test_a_sibling_is_taken_along_with_what_it_uses(ported, whole_model):
    mine = """
from .boats import BoatForCausalLM, BoatModel

class CanoeForCausalLM(BoatForCausalLM):
    pass
"""
    result = ported(mine, boats=whole_model)
    assert "# From vllm's boats.py:" in result.text
    assert result.text.index("class BoatForCausalLM") < result.text.index("class CanoeForCausalLM")
    assert result.text.count("class BoatAttention") == 1
    assert result.report.architectures == ("CanoeForCausalLM",)


def test_a_name_that_two_modules_define_gets_a_suffix(ported, whole_model):
    mine = """
from .boats import BoatForCausalLM

class BoatAttention(nn.Module):
    pass

class CanoeForCausalLM(BoatForCausalLM):
    other = BoatAttention
"""
    text = ported(mine, boats=whole_model).text
    assert "self.self_attn = BoatAttention_boats(" in text
    assert "class BoatAttention(nn.Module)" in text and "class BoatAttention_boats(nn.Module)" in text


def test_a_class_may_derive_from_an_imported_one_of_its_own_name(ported, whole_model):
    mine = """
from .boats import BoatAttention, BoatForCausalLM

class BoatAttention(BoatAttention):
    size = 3

class CanoeForCausalLM(BoatForCausalLM):
    other = BoatAttention
"""
    text = ported(mine, boats=whole_model).text
    assert "class BoatAttention_boats(nn.Module)" in text and "class BoatAttention(BoatAttention_boats)" in text
    assert "other = BoatAttention\n" in text


def test_an_architecture_of_another_name_gets_a_class_of_that_name(ported, models, whole_model):
    (models / "registry.py").write_text(
        '_TEXT_GENERATION_MODELS = {"FerryForCausalLM": ("harbor", "BoatForCausalLM"), "X": ("other", "Y")}\n'
    )
    result = ported(whole_model)
    assert "class FerryForCausalLM(BoatForCausalLM):\n    pass" in result.text
    assert "EntryClass = FerryForCausalLM" in result.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from vllm import x\ndef broken(:\n", "line 2: not Python"),
        ("import numpy\n", "imports neither vllm nor sglang"),
        ("from vllm.config import VllmConfig\nx = 1\n", "has no model class"),
        ("from vllm import V\nfrom .gone import AForCausalLM\nclass BForCausalLM(AForCausalLM): pass\n", "gone.py"),
    ],
)
def test_what_cannot_be_read_is_told(models: Path, text: str, said: str):
    (models / "m.py").write_text(text)
    with pytest.raises(PortError, match=said):
        port(models / "m.py")


def test_a_missing_file_a_folder_and_bytes_are_told(models: Path):
    with pytest.raises(PortError, match="there is no file"):
        port(models / "none.py")
    with pytest.raises(PortError, match="is a folder"):
        port(models)
    (models / "b.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PortError, match="UTF-8"):
        port(models / "b.py")


def test_an_unknown_architecture_names_those_of_the_file(ported, whole_model):
    with pytest.raises(PortError, match=r"no architecture Y; have \['BoatForCausalLM'\]"):
        ported(whole_model, "Y")


def test_a_layer_that_is_given_the_whole_configuration_beside_its_parts_gets_each_once(ported, whole_model):
    text = whole_model.replace(
        "BoatLayer(config, cache_config, quant_config, prefix=prefix)",
        "BoatLayer(vllm_config, config, cache_config, quant_config=quant_config, prefix=prefix)",
    ).replace(
        'def __init__(self, config, cache_config=None, quant_config=None, prefix=""):\n        super().__init__()\n'
        "        self.self_attn",
        'def __init__(self, vllm_config, config, cache_config=None, quant_config=None, prefix=""):\n'
        "        super().__init__()\n        self.self_attn",
    )
    assert text != whole_model
    assert "BoatLayer(config, quant_config=quant_config, prefix=prefix)" in ported(text).text


def test_defaults_before_the_stage_are_dropped_with_it(ported, whole_model):
    required = "positions: torch.Tensor,\n        intermediate_tensors: IntermediateTensors | None,"
    assert required in whole_model
    optional = required.replace("Tensor,", "Tensor = None,").replace("| None,", "| None = None,")
    text = ported(whole_model.replace(required, optional)).text
    assert "positions: torch.Tensor,\n        forward_batch: ForwardBatch," in text


@pytest.mark.parametrize(
    ("rule", "told"), [(lambda program: 1 / 0, "ZeroDivisionError"), (lambda program: None, "not valid Python")]
)
def test_a_fault_of_the_porter_is_told_as_such(ported, whole_model, monkeypatch, rule, told):
    monkeypatch.setitem(porter.RULES, "vllm", (rule,))
    monkeypatch.setattr(porter, "text_of", lambda program: "def (:")
    with pytest.raises(PortError, match=f"(?s){told}.*fault of the porter"):
        ported(whole_model)
