"""Weights of a GGUF file in a model: every type in one file, what is undone, what is refused, and by which name."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_blocks import random_blocks, values_of, write_tensors
from gguf_recurrent import RECURRENT
from torch import nn

from gguf_conversions import CONVERSIONS
from gguf_writing import write_gguf
from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.gguf.changes import CHANGES
from rtp_llm.srt.gguf.file import GGUFFile
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.gguf.header import GGUFError
from rtp_llm.srt.kernels.blocks import BLOCK_TYPES, PlainBlocks
from rtp_llm.srt.layers.auto_weights import AutoWeightsLoader
from rtp_llm.srt.layers.quantization.base import ExpertsLayer, PackedLayer, QuantizationError, stored_bytes
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.models.weight_loading import WeightLoadError
from tiny_models import make_tiny

Tensors = dict[str, tuple[str, torch.Tensor]]
HEADS, KEY_HEADS, HEAD_SIZE = 4, 2, 64
TYPES = [*sorted(BLOCK_TYPES), "F16", "BF16", "F32", "IQ2_XXS", "TQ1_0", "IQ3_S"]
SIZES = dict(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=HEADS,
    num_key_value_heads=KEY_HEADS,
    head_dim=HEAD_SIZE,
    vocab_size=75,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama's config.json and its GGUF in float32."""
    folder = tmp_path_factory.mktemp("llama")
    make_tiny("LlamaForCausalLM", folder, **SIZES)
    write_gguf(folder, folder / "float.gguf", CONVERSIONS["LlamaForCausalLM"])
    return folder


def tensors_of(checkpoint: Path) -> Tensors:
    file = GGUFFile.open(checkpoint / "float.gguf")
    return {name: (tensor.type.name, tensor.data.view(torch.float32)) for name, tensor in file.tensors.items()}


def stored(kind: str, shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as a file has it, as the writer takes it, and its values."""
    if kind in BLOCK_TYPES:
        blocks = random_blocks(kind, shape, seed)
        return blocks, values_of(blocks, kind)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8
    if kind in ("F32", "F16"):
        values = values if kind == "F32" else values.half()
        return values, values.float()
    if kind == "BF16":
        return values.bfloat16().view(torch.uint8), values.bfloat16().float()
    number = gguf.GGMLQuantizationType[kind]
    num_values, num_bytes = gguf.GGML_QUANT_SIZES[number]
    size = (*shape[:-1], shape[-1] // num_values, num_bytes)
    blocks = torch.randint(256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    place = num_bytes - 2 if kind == "TQ1_0" else 0
    blocks[..., place : place + 2] = torch.full((*size[:-1], 1), 0.01).half().view(torch.uint8)
    return blocks.flatten(-2), values_of(blocks.flatten(-2), kind)


def folder_with(checkpoint: Path, folder: Path, tensors: Tensors, architecture: str = "llama") -> str:
    """A checkpoint folder, as one is made of a GGUF, with these tensors."""
    config = (checkpoint / "config.json").read_text()
    settings = '{"quantization_config": {"quant_method": "gguf"}, '
    (folder / "config.json").write_text(config.replace("{", settings, 1))
    write_tensors(folder / "model.gguf", architecture, tensors)
    return str(folder)


def load(folder: str, dtype: str = "bfloat16", **options: Any) -> nn.Module:
    return load_model(ModelConfig.from_pretrained(folder, dtype=dtype), folder, **options)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The values of all tables and projections, in the checkpoint's parts."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, PackedLayer):
            packed = module.packed
            found[path] = packed.rows(torch.arange(packed.num_rows))
    return found


def permuted(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The row of each feature in the checkpoint, which has the first halves of a head's pairs before the second."""
    rows = [
        head * HEAD_SIZE + 2 * (feature % (HEAD_SIZE // 2)) + feature // (HEAD_SIZE // 2)
        for head in range(num_heads)
        for feature in range(HEAD_SIZE)
    ]
    return tensor[rows]


def expected_weights(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values of the file by the model's layers."""
    layers = {"model.embed_tokens": values["token_embd.weight"], "lm_head": values["output.weight"]}
    for number in range(SIZES["num_hidden_layers"]):

        def part(name: str, number: int = number) -> torch.Tensor:
            return values[f"blk.{number}.{name}.weight"]

        path = f"model.layers.{number}"
        q, k = permuted(part("attn_q"), HEADS), permuted(part("attn_k"), KEY_HEADS)
        layers[f"{path}.self_attn.qkv_proj"] = torch.cat((q, k, part("attn_v")))
        layers[f"{path}.self_attn.o_proj"] = part("attn_output")
        layers[f"{path}.mlp.gate_up_proj"] = torch.cat((part("ffn_gate"), part("ffn_up")))
        layers[f"{path}.mlp.down_proj"] = part("ffn_down")
    return layers


@pytest.fixture(scope="module")
def mixture(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    """A folder with a file of every type, in turn, and the values of its tensors."""
    tensors, values = tensors_of(checkpoint), {}
    matrices = [name for name, (_, data) in tensors.items() if data.dim() == 2]
    for seed, name in enumerate(matrices):
        kind = TYPES[seed % len(TYPES)]
        data, values[name] = stored(kind, tuple(tensors[name][1].shape), seed)
        tensors[name] = kind, data
    assert len(matrices) >= len(TYPES)
    return folder_with(checkpoint, tmp_path_factory.mktemp("mixture"), tensors), values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_of_every_type(
    mixture: tuple[str, dict[str, torch.Tensor]], dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, values = mixture
    seen: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO):
        model = load(folder, dtype, progress=lambda done, total: seen.append((done, total)))
    expected = expected_weights(values)
    found = weights_of(model)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight.to(getattr(torch, dtype)), expected[name].to(getattr(torch, dtype))), name
    assert "loaded as values" in caplog.text
    assert "IQ2_XXS" in caplog.text
    size = Path(folder, "model.gguf").stat().st_size
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size, size)


def test_weights_take_the_memory_of_the_file(checkpoint: Path, tmp_path: Path) -> None:
    tensors = tensors_of(checkpoint)
    for name, (_, data) in tensors.items():
        if data.dim() == 2:
            tensors[name] = "Q4_K", random_blocks("Q4_K", tuple(data.shape))
    folder = folder_with(checkpoint, tmp_path, tensors)
    model = load(folder, device="reference")
    assert stored_bytes(model) < Path(folder, "model.gguf").stat().st_size
    assert not load(folder, load_format="dummy").get_submodule("lm_head").packed.rows(torch.tensor([0])).isnan().any()


def broken(change: Callable[[Tensors], Any]) -> Callable[[Path, Path], str]:
    def make(checkpoint: Path, folder: Path) -> str:
        tensors = tensors_of(checkpoint)
        change(tensors)
        return folder_with(checkpoint, folder, tensors)

    return make


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("blk.1.attn_k.weight"), WeightLoadError, "model.layers.1.self_attn.k_proj.weight"),
        (lambda t: t.pop("blk.2.ffn_norm.weight"), WeightLoadError, "model.layers.2.post_attention_layernorm.weight"),
        (lambda t: t.update({"blk.1.nonsense.weight": t["blk.1.attn_k.weight"]}), WeightLoadError, "blk.1.nonsense"),
        (
            lambda t: t.update({"blk.0.attn_v.weight": t["blk.0.attn_q.weight"]}),
            WeightLoadError,
            r"model.layers.0.self_attn.v_proj.weight \[256, 256\] into .*shape \(128, 256\)",
        ),
        (
            lambda t: t.update({"blk.0.attn_q.weight": ("F32", torch.zeros(250, 256))}),
            GGUFError,
            r"blk.0.attn_q.weight \[250, 256\] cannot be permuted_queries",
        ),
        (
            lambda t: t.update({"blk.0.attn_v.weight": ("Q8_K", torch.zeros(128, 292, dtype=torch.uint8))}),
            GGUFError,
            "'blk.0.attn_v.weight' is of type Q8_K, which cannot be read",
        ),
        (
            lambda t: t.update({"blk.0.attn_v.weight": ("I32", torch.zeros(128, 256, dtype=torch.int32))}),
            GGUFError,
            "is of type I32",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    checkpoint: Path, tmp_path: Path, change: Callable[[Tensors], Any], error: type[Exception], message: str
) -> None:
    folder = broken(change)(checkpoint, tmp_path)
    with pytest.raises(error, match=message):
        load(folder)


@pytest.fixture
def llama_form(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    return lambda form: monkeypatch.setattr(LlamaForCausalLM, "gguf", form)


def test_what_a_form_does_not_say_is_named(checkpoint: Path, tmp_path: Path, llama_form: Callable[[Any], None]) -> None:
    folder = folder_with(checkpoint, tmp_path, tensors_of(checkpoint))
    wrong = {
        "no form": GGUFForm("qwen2"),
        "unknown changes turned_round": GGUFForm("llama", changes=[("q_proj", "turned_round")]),
        "no change of the form says how": GGUFForm(
            "llama", names={f"blk.{{bid}}.attn_{x}": "model.layers.{bid}.self_attn.qkv_proj" for x in "qkv"}
        ),
    }
    for message, form in wrong.items():
        llama_form(form)
        with pytest.raises(GGUFError, match=message):
            load(folder)
    with pytest.raises(QuantizationError, match="leave out --model-impl transformers"):
        load(folder, "float32", model_impl="transformers")


def test_names_of_a_form(
    checkpoint: Path, tmp_path: Path, llama_form: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tensors are one of the checkpoint's, in the form's order; one is several."""
    monkeypatch.setitem(CHANGES, "one above the other", lambda parts, config: torch.cat(list(parts)))
    tensors = tensors_of(checkpoint)
    values = {name: data for name, (_, data) in tensors.items()}
    permuted_keys = [values[f"blk.{i}.attn_k.weight"].clone() for i in range(3)]
    norms = torch.stack([values[f"blk.{i}.ffn_norm.weight"] for i in range(3)])
    for i in range(3):
        del tensors[f"blk.{i}.ffn_norm.weight"]
        tensors[f"blk.{i}.attn_k.weight"] = "F32", permuted_keys[i]
    tensors["all_norms"] = "F32", norms
    llama_form(
        GGUFForm(
            "llama",
            names={
                **{f"blk.{{bid}}.attn_{x}": "model.layers.{bid}.self_attn.qkv_proj" for x in "qkv"},
                "all_norms": "model.layers.{part}.post_attention_layernorm.weight",
            },
            changes=[("qkv_proj", "one above the other")],
        )
    )
    model: Any = load(folder_with(checkpoint, tmp_path, tensors), "float32")
    for i in range(3):
        assert torch.equal(model.model.layers[i].post_attention_layernorm.weight, norms[i])
        together = torch.cat([values[f"blk.{i}.attn_{x}.weight"] for x in "qkv"])
        assert torch.equal(model.model.layers[i].self_attn.qkv_proj.dequantized_weight(), together)


class OwnLoading(LlamaForCausalLM):
    """As model files of vLLM load."""

    gguf = LlamaForCausalLM.gguf

    def load_weights(self, weights: Any) -> set[str]:
        parts = [("qkv_proj", "q_proj", "q"), ("qkv_proj", "k_proj", "k"), ("qkv_proj", "v_proj", "v")]
        parts += [("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1)]  # type: ignore[list-item]
        params = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            for fused, part, shard_id in parts:
                if part in name:
                    name = name.replace(part, fused)
                    params[name].weight_loader(params[name], tensor, shard_id)
                    break
            else:
                AutoWeightsLoader(self).load_weights([(name, tensor)])
            loaded.add(name)
        return loaded


def test_a_model_that_loads_by_itself(
    mixture: tuple[str, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, values = mixture
    monkeypatch.setitem(ModelRegistry.models.overrides, "LlamaForCausalLM", OwnLoading)
    found = weights_of(load(folder))
    for name, weight in expected_weights(values).items():
        assert torch.equal(found[name].bfloat16(), weight.bfloat16()), name


class HeadWithBias(LlamaForCausalLM):
    gguf = LlamaForCausalLM.gguf

    def has_head_bias(self, config: Any) -> bool:
        return True


def test_a_tied_head_with_a_bias(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weight is a copy of the embedding's, which is packed by the time that the copy would be made."""
    monkeypatch.setitem(ModelRegistry.models.overrides, "LlamaForCausalLM", HeadWithBias)
    tensors = tensors_of(checkpoint)
    del tensors["output.weight"]
    tensors["output.bias"] = "F32", torch.ones(75)
    tensors["token_embd.weight"] = "Q6_K", random_blocks("Q6_K", (75, 256))
    folder = folder_with(checkpoint, tmp_path, tensors)
    config = Path(folder, "config.json")
    config.write_text(re.sub(r'"tie_word_embeddings": false', '"tie_word_embeddings": true', config.read_text()))
    found = weights_of(load(folder))
    assert torch.equal(found["lm_head"], found["model.embed_tokens"])
    assert torch.equal(found["lm_head"], values_of(tensors["token_embd.weight"][1], "Q6_K"))


def test_damaged_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(folder_with(checkpoint, tmp_path, tensors_of(checkpoint)))
    content = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(GGUFError, match="it is truncated"):
        load(str(folder))


# Sizes that are whole blocks of 32.
WHOLE = dict(hidden_size=64, intermediate_size=96, vocab_size=99)
DELTA: dict[str, Any] = dict(linear_num_key_heads=2, linear_num_value_heads=4)
DELTA |= dict(linear_key_head_dim=32, linear_value_head_dim=32, moe_intermediate_size=32)
DELTA |= dict(shared_expert_intermediate_size=64, layer_types=["linear_attention", "full_attention"] * 2)
REARRANGED = {
    "GPT2LMHeadModel": dict(n_embd=64, vocab_size=99),  # transposed
    "BloomForCausalLM": WHOLE | dict(seq_length=512),  # fused by heads
    "GptOssForCausalLM": WHOLE,  # gates and ups in turns
    "DeepseekV2ForCausalLM": WHOLE
    | dict(moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32, v_head_dim=32),
    "GraniteMoeForCausalLM": WHOLE,  # experts of two tensors that the checkpoint fuses
    "Qwen3NextForCausalLM": WHOLE | DELTA,  # two tensors that the checkpoint has in one, by heads
    "Qwen3_5ForCausalLM": WHOLE | DELTA,  # heads in another order, as rows and as columns
}
VALUES_IN_ALL = {
    "gate",
    "router",
    "kv_b_proj",
    "shared_expert_gate",
}  # which files have in float32, or latent attention splits


@pytest.mark.parametrize("architecture", REARRANGED)
def test_rearranged_weights_stay_in_their_blocks(architecture: str, tmp_path: Path) -> None:
    make_tiny(architecture, tmp_path, **REARRANGED[architecture])
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path, file, (CONVERSIONS | RECURRENT)[architecture], gguf.GGMLQuantizationType.Q8_0)
    models = []
    for dtype in ("float32", "bfloat16"):
        config = ModelConfig.from_pretrained(str(file), dtype=dtype, with_tokenizer=False)
        models.append(load_model(config, config.model_path, device="reference"))
    in_values, in_blocks = (dict(model.named_modules()) for model in models)
    for name, weight in weights_of(models[0]).items():
        packed: Any = in_blocks[name].packed
        assert isinstance(packed, PlainBlocks) or name.rpartition(".")[2] in VALUES_IN_ALL, name
        assert torch.equal(packed.rows(torch.arange(packed.num_rows)).bfloat16(), weight.bfloat16()), name
    for name, module in in_blocks.items():
        for part, packed in module.packed.items() if isinstance(module, ExpertsLayer) else ():
            assert all(isinstance(expert, PlainBlocks) for expert in packed.experts), name
            found = torch.stack([expert.rows(torch.arange(expert.num_rows)) for expert in packed.experts])
            assert torch.equal(found, in_values[name].packed[part].weight), name
