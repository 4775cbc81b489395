"""``rtp-llm tiny``: what it writes can be served and verified, and what it refuses."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rtp_llm import cli


def test_it_writes_a_checkpoint_with_fields_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_dir = tmp_path / "new" / "tiny"
    flags = ["--set", "residual_multiplier=0.22", "--set", "num_hidden_layers=2", "--set", "hidden_act=gelu"]
    assert cli.main(["tiny", "GraniteForCausalLM", str(model_dir), *flags]) == 0
    config = json.loads((model_dir / "config.json").read_text())
    assert config["architectures"] == ["GraniteForCausalLM"] and config["hidden_act"] == "gelu"
    assert (config["residual_multiplier"], config["num_hidden_layers"]) == (0.22, 2)
    assert all(len(tensor.unique()) > 1 for tensor in load_file(model_dir / "model.safetensors").values())
    assert AutoTokenizer.from_pretrained(model_dir)("ab cd").input_ids
    said = capsys.readouterr().out
    assert f"rtp-llm verify {model_dir}" in said
    neutral = said.partition("are one, ")[2].partition("--set")[0]
    assert "embedding_multiplier" in neutral and "logits_scaling" in neutral and "residual_multiplier" not in neutral


def test_it_keeps_the_structure_of_a_configuration(tmp_path: Path) -> None:
    published = tmp_path / "config.json"
    published.write_text(json.dumps({"num_attention_heads": 32, "num_key_value_heads": 1, "attention_bias": True}))
    assert cli.main(["tiny", "LlamaForCausalLM", str(tmp_path / "tiny"), "--config", str(published)]) == 0
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["attention_bias"]) == (4, 1, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["NobodysForCausalLM", "{}"], "has no model class NobodysForCausalLM"),
        (["Qwen2VLForConditionalGeneration", "{}"], "takes more than text (vision_config)"),
        (["LlamaForCausalLM", "{}", "--set", "layers"], "--set layers: FIELD=VALUE is expected"),
        (["LlamaForCausalLM", "{}/full"], "has a config.json already"),
        (["LlamaForCausalLM", "{}", "--config", "{}/full/config.json"], "holds no JSON object"),
    ],
)
def test_what_it_refuses(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("[]")
    assert cli.main(["tiny", *(argument.format(tmp_path) for argument in arguments)]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "config.json").exists()
