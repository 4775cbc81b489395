"""Any checkpoint that transformers can build is a reference: by its own code, by what is registered, by the mapping."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from remote_code import fresh_code
from rtp_llm.srt.configs.own_config import GeneralConfig
from rtp_llm.tools.auto_classes import AUTO_CLASSES, CannotBuildError, Way, choose, load_by_transformers, takes_images
from rtp_llm.tools.reference import TransformersModel
from tiny_models import tiny_model
from tiny_seeing import make_seeing
from warm_python import run_python

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class ZetaConfig(LlamaConfig):
    model_type = "zeta"

class ZetaForCausalLM(LlamaForCausalLM):
    config_class = ZetaConfig

class ZetaForConditionalGeneration(ZetaForCausalLM):
    def forward(self, input_ids=None, pixel_values=None, **options):
        return super().forward(input_ids, **options)
"""
AUTO_MAP = {"AutoConfig": "modeling_zeta.ZetaConfig", "AutoModelForCausalLM": "modeling_zeta.ZetaForCausalLM"}


class EtaConfig(LlamaConfig):
    model_type = "eta_of_test"


class EtaForCausalLM(LlamaForCausalLM):
    config_class = EtaConfig


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., str]:
    """A tiny Llama with other words in its config.json, and code beside it."""

    def make(**changes: Any) -> str:
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_model("llama-default"), folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        (folder / "modeling_zeta.py").write_text(CODE)
        return str(folder)

    return make


@pytest.fixture(autouse=True)
def forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers with transformers, and the code that it copies."""
    fresh_code(tmp_path / "cache", monkeypatch)
    mappings = [auto_class._model_mapping for auto_class in AUTO_CLASSES]
    before = [dict(mapping._extra_content) for mapping in (CONFIG_MAPPING, *mappings)]
    yield
    for mapping, content in zip((CONFIG_MAPPING, *mappings), before, strict=True):
        mapping._extra_content = content


def same_logits(model: Any) -> bool:
    plain = LlamaForCausalLM.from_pretrained(tiny_model("llama-default"), dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 3]])
    with torch.inference_mode():
        return torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel"])
def test_code_beside_the_weights(auto_class: str, changed) -> None:
    places = {"AutoConfig": AUTO_MAP["AutoConfig"], auto_class: AUTO_MAP["AutoModelForCausalLM"]}
    path = changed(model_type="zeta", architectures=["ZetaForCausalLM"], auto_map=places)
    model = TransformersModel(path, device="cpu", trust_remote_code=True)
    assert type(model.model).__name__ == "ZetaForCausalLM" and not model.takes_images
    assert same_logits(model.model)


def test_code_beside_the_weights_that_sees(changed) -> None:
    """The class that ``architectures`` names is taken, not the first of ``auto_map``."""
    name = "ZetaForConditionalGeneration"
    places = AUTO_MAP | {"AutoModelForImageTextToText": f"modeling_zeta.{name}"}
    path = changed(model_type="zeta", architectures=[name], auto_map=places)
    model = TransformersModel(path, device="cpu", trust_remote_code=True)
    assert type(model.model).__name__ == name and model.takes_images


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_a_registered_class(auto_class: Any, changed) -> None:
    auto_class.register(EtaConfig, EtaForCausalLM)
    path = changed(model_type="eta_of_test", architectures=["EtaForCausalLM"])
    own = EtaConfig.from_pretrained(path)  # as config_class of a model file gives it; AutoConfig does not know it
    model = load_by_transformers(path, own, dtype=torch.float32).eval()
    assert type(model) is EtaForCausalLM and same_logits(model)


def test_transformers_own_class(tmp_path: Path) -> None:
    assert type(TransformersModel(tiny_model("llama-default"), device="cpu").model) is LlamaForCausalLM
    seeing = TransformersModel(make_seeing(tmp_path), device="cpu")
    assert type(seeing.model).__name__ == "Qwen2VLForConditionalGeneration" and seeing.takes_images
    assert takes_images(seeing.model)


def test_what_was_tried_is_told(changed) -> None:
    names = {"model_type": "zeta", "architectures": ["ZetaForCausalLM"]}
    own = GeneralConfig(**names, auto_map=AUTO_MAP)
    with pytest.raises(
        CannotBuildError,
        match=r"cannot build ZetaForCausalLM of .*checkpoint\. Tried: AutoConfig: .*; auto_map of config\.json has "
        r"AutoModelForCausalLM, which needs --trust-remote-code; .*no class .* is registered for GeneralConfig",
    ) as caught:
        load_by_transformers(changed(**names, auto_map=AUTO_MAP), own)
    assert len(str(caught.value)) < 800  # no list of all that transformers has
    with pytest.raises(CannotBuildError, match=r"AutoConfig: .*model type `zeta`"):
        load_by_transformers(changed(**names), GeneralConfig(**names))


def test_the_named_class_is_chosen() -> None:
    ways = [Way(None, name, LlamaConfig()) for name in ("A", "B")]
    assert choose(ways, ["B"]).class_name == "B"
    assert choose(ways, ["C"]).class_name == "A"


def test_the_playground_takes_code_that_sees(changed) -> None:
    """Its images need a processor, so that only the model is looked at here."""
    path = changed(model_type="zeta", architectures=["ZetaForCausalLM"], auto_map=AUTO_MAP)
    script = ["scripts/playground/reference_hf.py", "--model-path", path, "--device", "cpu", "--trust-remote-code"]
    done = run_python([*script, "--model-type", "mllm"])
    assert done.returncode == 2
    assert "(ZetaForCausalLM) takes no images; use --model-type text" in done.stderr
