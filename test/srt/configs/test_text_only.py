"""Models that take text only, as far as is known before they are read."""

import json
from pathlib import Path
from typing import Any

import pytest

from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.configs.text_only import takes_text_only
from rtp_llm.srt.models.model_source import PACKAGE_VARIABLE

TEXT = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "awq"}}


def told(folder: Path, config: Any, **options: Any) -> bool:
    (folder / "config.json").write_text(json.dumps(config))
    return takes_text_only(ServerArgs(model_path=str(folder), **options))


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "GPT2LMHeadModel", "BloomModel"])
def test_language_models(tmp_path: Path, name: str) -> None:
    assert told(tmp_path, TEXT | {"architectures": [name]})


@pytest.mark.parametrize(
    "config",
    [
        TEXT | {"architectures": ["Qwen2VLForConditionalGeneration"]},
        TEXT | {"architectures": ["LlamaForCausalLM", "LlavaForConditionalGeneration"]},
        TEXT | {"vision_config": {"hidden_size": 8}},
        TEXT | {"text_config": {"hidden_size": 8}},
        TEXT | {"architectures": None},
        TEXT | {"architectures": []},
        [],
    ],
    ids=str,
)
def test_others(tmp_path: Path, config: Any) -> None:
    assert not told(tmp_path, config)


def test_where_other_code_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not told(tmp_path, TEXT, trust_remote_code=True)
    assert not told(tmp_path, TEXT, json_model_override_args='{"vision_config": {}}')
    monkeypatch.setenv(PACKAGE_VARIABLE, "somewhere")
    assert not told(tmp_path, TEXT)


def test_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "toy.gguf").touch()
    for path in (tmp_path / "toy.gguf", tmp_path, f"{tmp_path}:Q4_K_M", "owner/name:Q4_K_M", "owner/name/toy.gguf"):
        assert takes_text_only(ServerArgs(model_path=str(path)))


def test_a_hub_id_is_known_once_it_is_there(tmp_path: Path) -> None:
    args = ServerArgs(model_path="owner/text", download_dir=str(tmp_path))
    assert not takes_text_only(args)
    cached = tmp_path / "models--owner--text"  # as huggingface_hub lays it out
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123")
    (cached / "snapshots" / "0123").mkdir(parents=True)
    (cached / "snapshots" / "0123" / "config.json").write_text(json.dumps(TEXT))
    assert takes_text_only(args)
