"""An architecture brings its configuration: the registry finds it before config.json is read, wherever the class is."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rtp_llm import Engine, ModelRegistry
from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt.configs.model_config import ModelConfig, ModelConfigError, read_architectures
from rtp_llm.srt.configs.own_config import GeneralConfig, make_config
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.models.registrations import pack_by_value
from rtp_llm.srt.models.registry import PACKAGE_VARIABLE, ModelFile, ModelImportError, _ModelRegistry
from rtp_llm.tools.verify.model_class import registered
from tiny_models import assert_same_ids, random_prompts, reference, tiny_model
from warm_python import run_python

PACKAGE = """
from dataclasses import dataclass
from rtp_llm.models_py.llama import LlamaForCausalLM

@dataclass
class ZetaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_parameters: dict
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False

class ZetaForCausalLM(LlamaForCausalLM):
    config_class = ZetaConfig

EntryClass = ZetaForCausalLM
"""
REGISTERED = """
from transformers import AutoConfig, PreTrainedConfig
class EtaConfig(PreTrainedConfig):
    model_type = "eta_of_test"
    vocab_size: int = 9
    hidden_size: int = 8
    num_hidden_layers: int = 1
AutoConfig.register("eta_of_test", EtaConfig)
class EtaForCausalLM: pass
EntryClass = EtaForCausalLM
"""


@dataclass
class ZetaConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_stripes: int = 3


class ZetaForCausalLM(LlamaForCausalLM):
    config_class = ZetaConfig


@pytest.fixture
def zeta(tmp_path: Path) -> Callable[..., str]:
    """Writes config.json of a model type that transformers does not know."""

    def write(**changes: Any) -> str:
        sizes = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2}
        config = {"model_type": "zeta", "architectures": ["ZetaForCausalLM"], **sizes, **changes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a package that Python finds, and in which the environment's models are; returns its name."""
    folder = tmp_path / "packages"

    def write(source: str) -> str:
        name = f"models_of_test_{abs(hash(source)) % 10**8}"
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
        (folder / name / "model.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))
        return name

    return write


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., _ModelRegistry]]:
    """Another registry in place of the process's own; model types that its packages register are forgotten after."""

    def make(built_in: str = "rtp_llm.models_py", named: str = "") -> _ModelRegistry:
        monkeypatch.setenv(PACKAGE_VARIABLE, named)
        made = _ModelRegistry(built_in)
        monkeypatch.setattr("rtp_llm.srt.configs.hf_config.ModelRegistry", made)
        return made

    before = dict(CONFIG_MAPPING._extra_content)
    yield make
    CONFIG_MAPPING._extra_content = before


def test_set_in_a_script(zeta, registry) -> None:
    registry().models["ZetaForCausalLM"] = ZetaForCausalLM
    config = ModelConfig.from_pretrained(zeta(vocab_size=91))
    assert isinstance(config.hf_config, ZetaConfig)
    assert (config.vocab_size, config.hf_config.num_stripes) == (91, 3)
    overridden = ModelConfig.from_pretrained(zeta(), json_model_override_args={"num_stripes": 7})
    assert overridden.hf_config.num_stripes == 7


@pytest.mark.parametrize("place", ["built_in", "named"])
def test_in_a_package(place: str, zeta, package, registry) -> None:
    registry(**{place: package(PACKAGE)})
    more = {"intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = ModelConfig.from_pretrained(zeta(**more, rope_parameters={"rope_theta": 1e4}))
    assert (type(config.hf_config).__name__, config.hf_config.rms_norm_eps) == ("ZetaConfig", 1e-6)
    with pytest.raises(ModelConfigError, match=r"ZetaConfig of the model file cannot use .*no `intermediate_size`, "):
        ModelConfig.from_pretrained(zeta())


def test_what_a_package_registers_with_transformers_is_in_time(zeta, package, registry) -> None:
    registry(named=package(REGISTERED))
    config = ModelConfig.from_pretrained(zeta(model_type="eta_of_test", architectures=["EtaForCausalLM"]))
    assert type(config.hf_config).__name__ == "EtaConfig"


def test_without_a_class_the_files_own_fields_serve(zeta, registry) -> None:
    registry().models["ZetaForCausalLM"] = LlamaForCausalLM
    config = ModelConfig.from_pretrained(zeta(num_stripes=5, auto_map={"AutoConfig": "zeta.ZetaConfig"}))
    assert isinstance(config.hf_config, GeneralConfig)  # and no code of the checkpoint has run
    assert config.hf_config.num_stripes == 5
    with pytest.raises(ModelConfigError, match=r"the model file cannot use .*config\.json: it has no `vocab_size`"):
        ModelConfig.from_pretrained(zeta(vocab_size=None))


def test_a_known_model_type_keeps_transformers_class(registry) -> None:
    """Unless the model class names its own, and without importing a file of ours that does not."""
    ours = registry()
    path = tiny_model("llama-default")
    assert type(ModelConfig.from_pretrained(path).hf_config).__name__ == "LlamaConfig"
    assert isinstance(ours.models.entry("LlamaForCausalLM"), ModelFile)
    ours.models["LlamaForCausalLM"] = ZetaForCausalLM
    assert isinstance(ModelConfig.from_pretrained(path).hf_config, ZetaConfig)
    by_transformers = ModelConfig.from_server_args(ServerArgs(model_path=path, model_impl="transformers"))
    assert type(by_transformers.hf_config).__name__ == "LlamaConfig"


def test_files_of_ours_name_their_configuration_themselves() -> None:
    """One that only inherits it is not imported to find out, where transformers knows the model type."""
    for name, entry in ModelRegistry.models.layers[-1].items():
        if getattr(ModelRegistry.models[name], "config_class", None) is not None:
            assert isinstance(entry, ModelFile) and entry.source and entry.source.config_is_own, (
                f"{name} must say config_class in its own file"
            )


def test_nobody_knows_it(zeta, registry) -> None:
    registry()
    with pytest.raises(ModelConfigError, match=r"does not know the model type 'zeta', and there is no model file for"):
        ModelConfig.from_pretrained(zeta())
    with pytest.raises(ModelConfigError, match=r"only with --trust-remote-code"):
        ModelConfig.from_pretrained(zeta(auto_map={"AutoConfig": "zeta.ZetaConfig"}))


def test_a_broken_file_is_told(zeta, package, registry) -> None:
    registry(built_in=package(PACKAGE.replace("import dataclass", "import data_class")))
    with pytest.raises(ModelImportError, match=r"ZetaForCausalLM.*data_class"):
        ModelConfig.from_pretrained(zeta())


def test_a_class_for_verify_is_there_before_the_configuration(zeta, tmp_path: Path) -> None:
    changed = PACKAGE.replace("attention_bias: bool = False", "attention_bias: bool = False\n    num_stripes: int = 4")
    (tmp_path / "model.py").write_text(changed)
    more = {"intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    args = ServerArgs(model_path=zeta(**more, rope_parameters={"rope_theta": 1e4}))
    assert read_architectures(args) == ["ZetaForCausalLM"]
    with registered(args, f"{tmp_path / 'model.py'}:ZetaForCausalLM"):
        assert ModelConfig.from_server_args(args).hf_config.num_stripes == 4


@pytest.mark.parametrize("config_class", [None, ZetaConfig])
def test_it_reaches_other_processes(config_class: type | None) -> None:
    sizes = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2, "more": [1]}
    config = pickle.loads(pack_by_value(make_config(config_class, sizes)))
    assert (config.vocab_size, config.more, config.get_text_config().hidden_size) == (90, [1], 64)


def as_zeta(folder: Path) -> str:
    """A checkpoint of Llama's form whose model type transformers does not know; what Llama's reference answers to."""
    llama = Path(tiny_model("llama-default"))
    for file in llama.iterdir():
        if file.name != "config.json":
            os.link(file, folder / file.name)
    config = json.loads((llama / "config.json").read_text())
    new = {"model_type": "zeta", "architectures": ["ZetaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | new))
    return str(folder)


def test_it_is_served(tmp_path: Path, package, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = as_zeta(tmp_path)
    monkeypatch.setitem(ModelRegistry.models, "ZetaForCausalLM", LlamaForCausalLM)
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    (prompt,) = random_prompts(100, (9,))
    with Engine(model_path=model_dir, device="cpu", skip_tokenizer_init=True, max_total_tokens=128) as engine:
        assert isinstance(engine.model_config.hf_config, GeneralConfig)
        answer = engine.generate(input_ids=prompt, sampling_params=params)["output_ids"]
    assert_same_ids(answer, reference(tiny_model("llama-default"), tuple(prompt), 6))


def test_tools_find_it(tmp_path: Path, package, monkeypatch: pytest.MonkeyPatch) -> None:
    name = package(PACKAGE)
    monkeypatch.setenv(PACKAGE_VARIABLE, name)
    packages = str(tmp_path / "packages")
    (tmp_path / "checkpoint").mkdir()
    model_dir = as_zeta(tmp_path / "checkpoint")
    program, head = tmp_path / "program.py", f"import sys, runpy\nsys.path.insert(0, {packages!r})\n"
    program.write_text(f"{head}runpy.run_module('rtp_llm', run_name='__main__')")
    listed = run_python([str(program), "models"])
    assert "ZetaForCausalLM" in listed.stdout, listed.stderr
    sizes = ["--batch-size", "1", "--input-len", "8", "--output-len", "2", "--device", "cpu"]
    program.write_text(f"{head}runpy.run_module('rtp_llm.bench_one_batch', run_name='__main__')")
    done = run_python([str(program), "--model", model_dir, *sizes])
    assert done.returncode == 0, done.stderr
