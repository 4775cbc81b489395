"""Loading weights: files of every kind, and every rule of declarative loading on a hand-made checkpoint."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.models.weight_files import WeightFileError, WeightsNotFoundError, find_weight_files, read_weights
from rtp_llm.srt.models.weight_loading import WeightLoadError, load_weights, load_weights_declaratively

HIDDEN, VOCAB = 4, 6
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5), "c.bias": torch.zeros(1).bfloat16()}


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def write_sharded(directory: Path, suffix: str, save) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i, (name, tensor) in enumerate(TENSORS.items()):
        shard = f"{stem}-0000{i + 1}-of-00003.{suffix}"
        save({name: tensor}, directory / shard)
        weight_map[name] = shard
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read(directory: Path, load_format: str = "auto", **kwargs) -> dict[str, torch.Tensor]:
    return dict(read_weights(find_weight_files(str(directory), load_format), **kwargs))


def assert_all_read(weights: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == TENSORS.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])


# Files


def test_one_safetensors_file(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_all_read(read(tmp_path))
    assert_all_read(read(tmp_path, "safetensors"))


def test_sharded_safetensors(tmp_path):
    write_sharded(tmp_path, "safetensors", lambda tensors, path: write_safetensors(path, tensors))
    assert_all_read(read(tmp_path))


def test_safetensors_of_any_name(tmp_path):
    for i, (name, tensor) in enumerate(TENSORS.items()):
        write_safetensors(tmp_path / f"part{i}.safetensors", {name: tensor})
    write_safetensors(tmp_path / "consolidated.safetensors", {"the.same.again": torch.zeros(1)})
    assert_all_read(read(tmp_path))


def test_a_single_file_beside_the_index_of_others_is_preferred(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "gone.safetensors"}}')
    assert_all_read(read(tmp_path))


@pytest.mark.parametrize("load_format", ["auto", "pt"])
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_one_bin_file(tmp_path, load_format, new_format):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    assert_all_read(read(tmp_path, load_format))


def test_sharded_bin(tmp_path):
    write_sharded(tmp_path, "bin", torch.save)
    assert_all_read(read(tmp_path))


def test_pt_files(tmp_path):
    torch.save(TENSORS, tmp_path / "weights.pt")
    torch.save({}, tmp_path / "optimizer.pt")
    assert_all_read(read(tmp_path, "pt"))


def test_missing_shards_are_all_named(tmp_path):
    write_sharded(tmp_path, "safetensors", lambda tensors, path: write_safetensors(path, tensors))
    for i in (1, 3):
        (tmp_path / f"model-0000{i}-of-00003.safetensors").unlink()
    with pytest.raises(WeightsNotFoundError, match=r"2 of the 3 .*model-00001-of-00003.*model-00003-of-00003"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_a_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightFileError, match=r"model\.safetensors\.index\.json is not an index"):
        read(tmp_path)


def test_an_index_that_names_a_directory(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": ""}}')
    with pytest.raises(WeightsNotFoundError, match=r"1 of the 1 files that .* names are missing"):
        read(tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(WeightsNotFoundError) as caught:
        read(tmp_path)
    message = str(caught.value)
    for name in ("model.safetensors,", "model.safetensors.index.json", "*.safetensors", "*.bin", "*.pt", "config.json"):
        assert name in message
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsNotFoundError, match=r"looked for model\.safetensors, "):
        read(tmp_path, "safetensors")
    with pytest.raises(ValueError, match="load format 'tar' has no weight files; have auto, safetensors, pt"):
        read(tmp_path, "tar")


@pytest.mark.parametrize("size", [0, 5, 40, -3])
def test_truncated_safetensors(tmp_path, size):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightFileError, match=r"model\.safetensors is truncated or corrupt .*download it again"):
        read(tmp_path)


@pytest.mark.parametrize("size", [0, 3, 100, -30])
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_truncated_bin(tmp_path, size, new_format):
    path = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=new_format)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightFileError, match=r"pytorch_model\.bin is truncated or corrupt .*download it again"):
        read(tmp_path)


class Arbitrary:
    pass


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_bin_file_with_other_objects_is_refused(tmp_path, new_format):
    torch.save({"a": Arbitrary()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    with pytest.raises(WeightFileError, match=r"refused: it holds more than tensors \(.*Arbitrary\)"):
        read(tmp_path)


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.zeros(1)}}, [torch.zeros(1)], {3: torch.zeros(1)}])
def test_a_bin_file_must_be_a_flat_dictionary(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightFileError, match=r"must hold a (flat )?dictionary of (named )?tensors"):
        read(tmp_path)


def test_progress_reaches_the_total(tmp_path):
    write_sharded(tmp_path, "safetensors", lambda tensors, path: write_safetensors(path, tensors))
    calls: list[tuple[int, int]] = []
    read(tmp_path, progress=lambda done, total: calls.append((done, total)))
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert calls == sorted(calls) and calls[-1] == (total, total) and {t for _, t in calls} == {total}
    assert len(calls) == 4


# Declarative loading: a model in miniature


class Packed(nn.Module):
    """Three sources of HIDDEN outputs each."""

    def __init__(self, ids: tuple[str | int, ...]) -> None:
        super().__init__()
        self.ids = ids
        self.weight = nn.Parameter(torch.empty(len(ids) * HIDDEN, HIDDEN))
        self.weight.weight_loader = self.weight_loader

    def weight_loader(self, param, tensor, shard_id=None) -> None:
        target = param.data
        if shard_id is not None:
            target = target[self.ids.index(shard_id) * HIDDEN :][:HIDDEN]
        if target.shape != tensor.shape:
            raise ValueError(f"expected shape {list(target.shape)}, got {list(tensor.shape)}")
        target.copy_(tensor)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = Packed(("q", "k", "v"))
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = Packed((0, 1))


class Tiny(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, config=None, quant_config=None, prefix="") -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.model.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.model.norm = nn.Module()
        self.model.norm.register_buffer("scale", torch.empty(HIDDEN))
        self.model.norm.register_buffer("table", torch.full((3,), 7.0), persistent=False)
        self.lm_head = self.head(config)

    def head(self, config) -> nn.Module:
        return nn.Linear(HIDDEN, VOCAB, bias=False)


class Tied(Tiny):
    def head(self, config) -> nn.Module:
        return self.model.embed_tokens


def checkpoint() -> dict[str, torch.Tensor]:
    """What fits Tiny, with a distinct value everywhere."""
    generator = torch.Generator().manual_seed(0)
    names = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.scale": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(2):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            names[f"model.layers.{i}.{part}.weight"] = (HIDDEN, HIDDEN)
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def tied_checkpoint() -> dict[str, torch.Tensor]:
    weights = checkpoint()
    del weights["lm_head.weight"]
    return weights


def load(weights: dict[str, torch.Tensor], model_class: type = Tiny, num_layers: int | None = 2) -> nn.Module:
    model = model_class()
    with torch.no_grad():
        load_weights_declaratively(model, weights.items(), num_layers)
    return model


def failure(weights: dict[str, torch.Tensor], model_class: type = Tiny, num_layers: int | None = 2) -> str:
    with pytest.raises(WeightLoadError) as caught:
        load(weights, model_class, num_layers)
    return str(caught.value)


def assert_loaded(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    parts = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
    parts |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    state = model.state_dict()
    for name, tensor in weights.items():
        source = name.split(".")[-2]
        if source in parts:
            packed, i = parts[source]
            assert torch.equal(state[name.replace(source, packed)][i * HIDDEN : (i + 1) * HIDDEN], tensor), name
        else:
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("order", [1, -1])
def test_names_packed_modules_and_buffers(order):
    weights = dict(list(checkpoint().items())[::order])
    model = load(weights)
    assert_loaded(model, weights)
    assert model.model.norm.table.tolist() == [7.0] * 3


def test_a_packed_parameter_may_come_in_one_piece():
    weights = checkpoint()
    for i in range(2):
        sources = [f"model.layers.{i}.self_attn.{x}_proj.weight" for x in "qkv"]
        weights[f"model.layers.{i}.self_attn.qkv_proj.weight"] = torch.cat([weights.pop(name) for name in sources])
    assert_loaded(load(weights), weights)


def test_shard_ids_that_a_layer_names():
    class Named(Tiny):
        def __init__(self) -> None:
            super().__init__()
            for layer in self.model.layers:
                layer.mlp.gate_up_proj.ids = layer.mlp.gate_up_proj.shard_ids = ("w1", "w3")

    assert_loaded(load(checkpoint(), Named), checkpoint())


class TiedUnlessStored(Tiny):
    weight_defaults = {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_parameter_takes_the_values_of_another_only_where_the_checkpoint_has_none():
    weights = checkpoint()
    assert torch.equal(load(weights, TiedUnlessStored).lm_head.weight, weights["lm_head.weight"])
    weights = tied_checkpoint()
    assert torch.equal(load(weights, TiedUnlessStored).lm_head.weight, weights["model.embed_tokens.weight"])
    del weights["model.embed_tokens.weight"]
    message = failure(weights, TiedUnlessStored)
    assert "model.embed_tokens.weight" in message
    assert "lm_head.weight" in message


def test_a_separate_module_of_a_source_name_is_not_packed():
    class Mixed(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.ModuleDict({"q_proj": nn.Linear(3, 2, bias=False)})

    weights = {**checkpoint(), "visual.q_proj.weight": torch.ones(2, 3)}
    assert load(weights, Mixed).visual["q_proj"].weight.sum() == 6


class Experts(nn.Module):
    """Two sources, or one in their place."""

    weight_sources = {"all": ("weight", None)} | {f"{i}.up.weight": ("weight", (i, "w1")) for i in range(2)}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, HIDDEN))
        self.weight.weight_loader = lambda param, tensor, shard_id=None: param.data[
            slice(None) if shard_id is None else shard_id[0]
        ].copy_(tensor)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module()])
        self.model.layers[0].experts = Experts()


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_sources_that_a_module_declares(prefix):
    weight, path = torch.randn(2, HIDDEN), f"{prefix}layers.0.experts"
    apart = {f"{path}.{i}.up.weight": weight[i] for i in range(2)}
    for weights in ({f"{path}.all": weight}, apart):
        assert torch.equal(load(weights, Mixture).model.layers[0].experts.weight, weight)
    message = failure({f"{path}.1.up.weight": weight[1]}, Mixture)
    assert f"model.layers.0.experts.weight [2, {HIDDEN}], made of model.layers.0.experts.0.up.weight" in message
    assert "came twice" in failure({f"{path}.all": weight} | apart, Mixture)
    assert f"{path}.2.up.weight [{HIDDEN}]" in failure(apart | {f"{path}.2.up.weight": weight[0]}, Mixture)


def test_rename_comes_first():
    class Renamed(Tiny):
        rename = [(r"^transformer\.", "model."), (r"\.wq\.", ".q_proj."), (r"^model\.skip", "mtp")]

    weights = {
        name.replace("model.", "transformer.", 1).replace("q_proj", "wq"): tensor
        for name, tensor in checkpoint().items()
    }
    assert_loaded(load({**weights, "transformer.skip.x": torch.zeros(1)}, Renamed), checkpoint())


def test_everything_wrong_is_named_at_once():
    weights = checkpoint()
    del weights["model.layers.1.self_attn.k_proj.weight"], weights["model.layers.0.mlp.gate_proj.weight"]
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.scale"], weights["lm_head.weight"]
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, HIDDEN)
    weights["model.embed_tokens.weight"] = torch.zeros(VOCAB + 1, HIDDEN)
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(HIDDEN)
    weights["zzz"] = torch.zeros(2, 2)
    weights["model.layers.0.self_attn.v_proj.weight"] = torch.zeros(HIDDEN, HIDDEN, dtype=torch.int8)
    expected = """\
        the checkpoint does not fit Tiny:
        3 tensors do not fit:
          model.embed_tokens.weight [7, 4] into model.embed_tokens.weight: expected shape [6, 4], got [7, 4]
          model.layers.0.self_attn.q_proj.weight [3, 4] into model.layers.0.self_attn.qkv_proj.weight: expected shape [4, 4], got [3, 4]
          model.layers.0.self_attn.v_proj.weight [4, 4] into model.layers.0.self_attn.qkv_proj.weight: expected dtype torch.float32, got torch.int8
        2 tensors have no place in the model:
          model.layers.1.self_attn.q_proj.bias [4]
          zzz [2, 2]
        4 parameters were not set:
          lm_head.weight [6, 4]
          model.layers.0.mlp.gate_up_proj.weight [8, 4], made of model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight
          model.layers.1.self_attn.qkv_proj.weight [12, 4], made of model.layers.1.self_attn.k_proj.weight
          model.norm.scale [4]
        If the head is meant to share the embedding's weights, set tie_word_embeddings: --json-model-override-args '{"tie_word_embeddings": true}'"""  # noqa: E501
    assert sorted(failure(weights).split("\n")) == sorted(textwrap.dedent(expected).split("\n"))


def test_a_tensor_that_comes_twice():
    weights = list(checkpoint().items())
    fused = ("model.layers.0.self_attn.qkv_proj.weight", torch.zeros(3 * HIDDEN, HIDDEN))
    again = ("model.norm.scale", torch.zeros(HIDDEN))
    with pytest.raises(
        WeightLoadError, match=r"2 tensors came twice:\n  model.layers.0.*qkv_proj.*\n  model.norm.scale"
    ):
        load_weights_declaratively(Tiny().requires_grad_(False), [*weights, fused, again])


def test_an_error_in_a_weight_loader_tells_which_tensor():
    model = Tiny().requires_grad_(False)

    def broken(param, tensor, shard_id=None):
        raise RuntimeError("out of memory")

    model.lm_head.weight.weight_loader = broken
    with pytest.raises(RuntimeError) as caught:
        load_weights_declaratively(model, checkpoint().items())
    assert caught.value.__notes__ == ["while loading lm_head.weight [6, 4] into lm_head.weight [6, 4]"]


# What may be left over


COMMON = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.sin_cached",
    "transformer.h.0.attn.bias",
    "transformer.h.0.attn.masked_bias",
    "gpt_neox.layers.0.attention.bias",
    "gpt_neox.layers.0.attention.masked_bias",
    "h.0.self_attention.bias",
    "mtp.layers.0.mlp.up_proj.weight",
    "mtp.norm.weight",
    "model.mtp.fc.weight",
    "model.mtp_layers.0.eh_proj.weight",
    "model.layers.2.eh_proj.weight",
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.11.shared_head.norm.weight",
]


@pytest.mark.parametrize("name", COMMON)
def test_what_real_checkpoints_carry_is_ignored(name):
    assert_loaded(load({**checkpoint(), name: torch.zeros(1)}), checkpoint())


@pytest.mark.parametrize(
    "name", ["model.layers.0.attn.c_attn.bias", "model.layers.1.x", "h.0.attn.proj.bias", "rotary_emb.weight", "amtp.x"]
)
def test_what_only_resembles_it_is_not(name):
    assert f"1 tensors have no place in the model:\n  {name} [1]" in failure({**checkpoint(), name: torch.zeros(1)})


def test_extra_layers_count_only_where_the_number_of_layers_is_known():
    weights = {**checkpoint(), "model.layers.2.norm.weight": torch.zeros(1)}
    assert "model.layers.2.norm.weight" in failure(weights, num_layers=None)


def test_a_models_own_ignore_list_and_the_line_about_it(caplog):
    class Ignoring(Tiny):
        ignore = [r"^visual\."]

    extra = ["visual.a", "visual.b", "rotary_emb.inv_freq", "layers.5.x"]
    with caplog.at_level("INFO"):
        load({**checkpoint(), **{name: torch.zeros(1) for name in extra}}, Ignoring)
    assert [record.getMessage() for record in caplog.records] == [
        r"ignored 4 tensors of the checkpoint: 2 by ^visual\.; 1 by (^|\.)rotary_emb\.(original_)?inv_freq$; "
        "1 by layers from number 2 on"
    ]
    assert "visual.a" in failure({**checkpoint(), "visual.a": torch.zeros(1)})


def test_an_ignore_pattern_never_hides_a_parameter():
    class Careless(Tiny):
        ignore = ["embed", "layers", "proj"]

    assert_loaded(load(checkpoint(), Careless), checkpoint())
    assert_loaded(load(checkpoint(), num_layers=1), checkpoint())
    weights = checkpoint()
    del weights["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight" in failure(weights, Careless)


# Tied heads


@pytest.mark.parametrize("order", [1, -1])
def test_a_redundant_tied_head_is_ignored(order, caplog):
    weights = tied_checkpoint()
    both = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    with caplog.at_level("INFO"):
        assert_loaded(load(dict(list(both.items())[::order]), Tied), both)
    assert "1 by tied to another tensor, and equal" in caplog.text
    assert_loaded(load(weights, Tied), weights)


def test_a_head_without_its_embedding_is_the_embedding():
    weights = tied_checkpoint()
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    model = load(weights, Tied)
    assert torch.equal(model.model.embed_tokens.weight, weights["lm_head.weight"])


def test_a_tied_head_of_other_values_is_an_error():
    message = failure(checkpoint(), Tied)
    assert "1 tensors differ though the model ties them:\n  lm_head.weight [6, 4]" in message
    assert "model.embed_tokens.weight [6, 4]: to use both, set tie_word_embeddings to false" in message


def test_neither_head_nor_embedding():
    weights = tied_checkpoint()
    del weights["model.embed_tokens.weight"]
    assert "1 parameters were not set:\n  model.embed_tokens.weight [6, 4]" in failure(weights, Tied)


# The base model's names


def test_names_as_saved_from_the_base_model(caplog):
    weights = tied_checkpoint()
    short = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    with caplog.at_level("INFO"):
        assert_loaded(load({**short, "rotary_emb.inv_freq": torch.zeros(1)}, Tied), weights)
    assert "its names were read as model.*" in caplog.text
    message = failure(short)
    assert "parameters were not set:\n  lm_head.weight [6, 4]\nIf the head is meant to share" in message
    assert "Otherwise the checkpoint is of the bare model without a head" in message


def test_a_mixture_of_names_is_not_accepted():
    weights = tied_checkpoint()
    weights["norm.scale"] = weights.pop("model.norm.scale")
    assert "1 tensors have no place in the model:\n  norm.scale [4]" in failure(weights, Tied)


# load_weights in the style of other engines


@pytest.mark.parametrize(("returned", "fails"), [(None, False), ({"a", "b"}, False), ({"a"}, True)])
def test_a_models_own_load_weights(returned, fails):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))

        def load_weights(self, weights):
            self.seen = dict(weights)
            self.a.data.fill_(1), self.b.data.fill_(1)
            return returned

    model = Own()
    if fails:
        with pytest.raises(WeightLoadError, match=r"1 parameters were not set by its load_weights:\n  b \[3\]"):
            load_weights(model, iter(TENSORS.items()))
    else:
        load_weights(model, iter(TENSORS.items()))
    assert model.seen == TENSORS


# The whole way


@pytest.fixture
def tiny_directory(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(ModelRegistry.models, "TinyForTest", Tiny)
    config = {"architectures": ["TinyForTest"], "model_type": "llama", "num_hidden_layers": 2, "vocab_size": VOCAB}
    config |= {"hidden_size": HIDDEN, "num_attention_heads": 1, "intermediate_size": 4, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", checkpoint())
    return tmp_path


def load_directory(path: Path, **kwargs) -> nn.Module:
    config_args = {key: kwargs.pop(key) for key in ("dtype", "json_model_override_args") if key in kwargs}
    return load_model(ModelConfig.from_pretrained(str(path), **config_args), str(path), **kwargs)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_load_model(tiny_directory, dtype):
    model = load_directory(tiny_directory, dtype=dtype)
    wanted = torch.bfloat16 if dtype == "auto" else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert_loaded(model, {name: tensor.to(wanted) for name, tensor in checkpoint().items()})
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_the_default_dtype_comes_back_after_an_error(tiny_directory):
    write_safetensors(tiny_directory / "model.safetensors", TENSORS)
    with pytest.raises(WeightLoadError):
        load_directory(tiny_directory)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Gemma2ForCausalLM"]}, "AttributeError: 'LlamaConfig' object has no attribute"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 0},
            "null for none; not 0",
        ),
        ({"architectures": ["LlamaForCausalLM"], "hidden_act": "no_such"}, "unknown gated activation 'no_such'"),
    ],
)
def test_a_model_that_the_configuration_cannot_build_names_both(tiny_directory, changes, message):
    config_file = tiny_directory / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | changes))
    [architecture] = changes["architectures"]
    with pytest.raises(ModelBuildError, match=f"^{architecture} cannot be built from .*config.json: .*{message}"):
        load_directory(tiny_directory)


def test_hooks_run_once_after_loading(tiny_directory, monkeypatch):
    calls: list[str] = []

    class Method:
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            calls.append(f"process {layer.weight.sum() == checkpoint()['lm_head.weight'].sum()}")

    class Hooked(Tiny):
        def head(self, config) -> nn.Module:
            head = super().head(config)
            head.quant_method = Method()
            head.finish_load = lambda: calls.append("finish head")
            return head

        def finish_load(self) -> None:
            calls.append("finish model")

    monkeypatch.setitem(ModelRegistry.models, "TinyForTest", Hooked)
    load_directory(tiny_directory, dtype="float32")
    assert calls == ["process True", "finish model", "finish head"]


def test_dummy_weights_need_no_file(tiny_directory):
    (tiny_directory / "model.safetensors").unlink()
    first, second = (load_directory(tiny_directory, load_format="dummy").state_dict() for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert tensor.float().abs().max() <= 0.0501 and tensor.float().std() > 0.01
    with pytest.raises(WeightsNotFoundError):
        load_directory(tiny_directory)


def test_a_quantized_checkpoint_is_refused(tiny_directory):
    with pytest.raises(ValueError, match=r"is quantized by 'hqq', which is not supported; have gptq, awq, "):
        load_directory(tiny_directory, json_model_override_args={"quantization_config": {"quant_method": "hqq"}})


class Recorded:
    """A quantization method that keeps what it was called for."""

    def __init__(self) -> None:
        self.processed: list[nn.Module] = []

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.processed.append(layer)


def test_a_layers_weights_are_processed_once_it_has_them_all():
    model, method = Tiny(), Recorded()
    layers = [layer.self_attn.qkv_proj for layer in model.model.layers]
    for layer in layers:
        layer.quant_method = method

    def watched():
        names = sorted(checkpoint(), key=lambda name: ("layers.1" in name, name))
        for name in names:
            if "layers.1" in name:
                assert method.processed == layers[:1]
            yield name, checkpoint()[name]

    load_weights(model, watched())
    assert method.processed == layers


def llama_config(**kwargs) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=31, dtype="float32", **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1GB", "2KB"])
def test_a_checkpoint_that_transformers_wrote(tmp_path, tied, shard_size):
    torch.manual_seed(0)
    reference = LlamaForCausalLM(llama_config(tie_word_embeddings=tied))
    reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "2KB")
    state = load_directory(tmp_path).state_dict()
    expected = reference.state_dict()
    qkv = torch.cat([expected[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(state["model.layers.1.self_attn.qkv_proj.weight"], qkv)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        assert torch.equal(state[name], expected[name])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(state[name][:31], expected[name])


def test_a_checkpoint_of_the_base_model(tmp_path):
    reference = LlamaForCausalLM(llama_config(tie_word_embeddings=True))
    reference.model.save_pretrained(tmp_path)
    override = {"architectures": ["LlamaForCausalLM"]}
    state = load_directory(tmp_path, json_model_override_args=override).state_dict()
    assert torch.equal(state["lm_head.weight"][:31], reference.lm_head.weight)


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from torch import nn
from rtp_llm.srt.models.weight_loading import load_weights_declaratively
from rtp_llm.srt.models.weight_files import find_weight_files, read_weights

def anonymous_bytes() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024

model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.empty(1280, 1024), requires_grad=False) for i in range(16)})
before, peak, done = anonymous_bytes(), 0, False

def watch() -> None:
    global peak
    while not done:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
load_weights_declaratively(model, read_weights(find_weight_files(sys.argv[1])))
done = True
thread.join()
size = sum(parameter.nbytes for parameter in model.parameters())
still_mapped = sum(sys.argv[1] in line for line in open("/proc/self/maps"))
print((max(peak, anonymous_bytes()) - before) / size, still_mapped)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_loading_takes_the_models_size_in_memory(tmp_path, kind):
    """84 MB of parameters in four files: no more than that in anonymous memory, and no file left mapped."""
    for shard in range(4):
        tensors = {f"p{i}": torch.full((1280, 1024), float(i)) for i in range(4 * shard, 4 * shard + 4)}
        if kind == "safetensors":
            write_safetensors(tmp_path / f"model-{shard}.safetensors", tensors)
        else:
            torch.save(tensors, tmp_path / f"pytorch_model-{shard}.bin")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    ratio, still_mapped = run.stdout.split()
    assert 0.95 < float(ratio) < 1.1
    assert still_mapped == "0"
