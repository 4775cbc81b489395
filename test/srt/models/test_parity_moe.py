"""Mixtral, Qwen2-MoE, Qwen3-MoE and gpt-oss, MXFP4 included, in our engine against transformers, in float32.

Each checkpoint is asked in chunks, batched, from a warm cache, and for a second turn, with prompts past every window.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from parity import CHECKS, CHUNKS, PAGES, Case, Served, check_anew, check_two_ranks, engine_fixture
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.kernels.blocks import dequantize_blocks
from rtp_llm.srt.layers.moe import Experts, FusedMoE
from rtp_llm.srt.layers.quantization import mxfp4
from rtp_llm.srt.layers.quantization.base import QuantizedModel
from rtp_llm.srt.layers.quantization.mxfp4 import Mxfp4Config
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.weight_loading import WeightLoadError
from tiny_models import make_tiny

FULL, WINDOW = "full_attention", "sliding_attention"


def random_mxfp4(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales that stand for [experts, outputs, inputs] values of the usual size of weights."""
    *rows, inputs = shape
    generator = torch.Generator().manual_seed(inputs)
    blocks = torch.randint(256, (*rows, inputs // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 125, (*rows, inputs // 32), dtype=torch.uint8, generator=generator)
    return blocks, scales


def quantize(model_dir: Path, quantized_dir: Path) -> str:
    """Writes a twin with random MXFP4 experts in gpt-oss's own layout, and their values into ``model_dir``."""
    tensors = load_file(model_dir / "model.safetensors")
    halves: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = {}, {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        blocks, scales = random_mxfp4(experts, outputs, inputs)
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        halves[0][f"{name}_blocks"], halves[1][f"{name}_scales"] = blocks, scales
    others = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in halves[0]}
    save_file(tensors, model_dir / "model.safetensors")
    save_file(others | halves[0], quantized_dir / "model-00001-of-00002.safetensors")
    save_file(halves[1], quantized_dir / "model-00002-of-00002.safetensors")
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (quantized_dir / "config.json").write_text(json.dumps(config))
    return str(quantized_dir)


THREE_LAYERS = dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3)
CASES = (
    Case(
        "mixtral",
        "MixtralForCausalLM",
        THREE_LAYERS | dict(head_dim=16, intermediate_size=44, num_local_experts=5, sliding_window=7),
        PAGES,
    ),
    Case(
        "mixtral-full-tied-gelu",
        "MixtralForCausalLM",
        dict(sliding_window=None, tie_word_embeddings=True, hidden_act="gelu", num_experts_per_tok=3),
        CHUNKS,
        slow=True,
    ),
    Case(
        "qwen2-moe",
        "Qwen2MoeForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_hidden_layers=4, mlp_only_layers=[1], num_experts=5)
        | dict(moe_intermediate_size=36, shared_expert_intermediate_size=52, norm_topk_prob=False)
        | dict(use_sliding_window=True, sliding_window=7, max_window_layers=2),
        CHUNKS,
    ),
    Case(
        "qwen2-moe-normed-tied-no-bias",
        "Qwen2MoeForCausalLM",
        dict(decoder_sparse_step=2, norm_topk_prob=True, tie_word_embeddings=True, qkv_bias=False, hidden_act="gelu")
        | dict(use_sliding_window=True, sliding_window=16, layer_types=[FULL, WINDOW, WINDOW, FULL]),
        PAGES,
        slow=True,
    ),
    Case(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        THREE_LAYERS
        | dict(head_dim=24, num_local_experts=5, num_experts_per_tok=3, moe_intermediate_size=36)
        | dict(decoder_sparse_step=1, mlp_only_layers=[0], norm_topk_prob=True, use_sliding_window=False),
        PAGES,
    ),
    Case(
        "qwen3-moe-window-tied-bias",
        "Qwen3MoeForCausalLM",
        dict(decoder_sparse_step=2, mlp_only_layers=[3], num_hidden_layers=6, norm_topk_prob=False)
        | dict(use_sliding_window=True, sliding_window=11, attention_bias=True, tie_word_embeddings=True),
        CHUNKS,
        slow=True,
    ),
    Case(
        "gpt-oss",
        "GptOssForCausalLM",
        THREE_LAYERS
        | dict(intermediate_size=44, num_local_experts=5, num_experts_per_tok=3, sliding_window=7)
        | dict(swiglu_alpha=1.3, swiglu_limit=0.6),  # a limit that is met
        PAGES,
    ),
    Case(
        "gpt-oss-other-layers-tied-no-bias",
        "GptOssForCausalLM",
        dict(layer_types=[FULL, WINDOW, WINDOW, FULL], sliding_window=16, num_key_value_heads=1, head_dim=24)
        | dict(attention_bias=False, tie_word_embeddings=True, rope_parameters={"rope_type": "default"}),
        CHUNKS,
        slow=True,
    ),
    Case(
        "gpt-oss-mxfp4",
        "GptOssForCausalLM",
        dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96, sliding_window=16),
        CHUNKS,
        twin=quantize,
    ),
)


engine_of_case = engine_fixture(CASES)


@pytest.mark.parametrize("check", CHECKS)
def test_answers_are_those_of_transformers(engine_of_case: Served, check: Callable[[Served], None]) -> None:
    check_anew(check, engine_of_case)


@pytest.mark.slow
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "qwen2-moe", "qwen3-moe"])
def test_two_ranks(name: str, tmp_path: Path) -> None:
    """Sinks, biases of experts, and a shared expert, each counted once."""
    case = next(case for case in CASES if case.name == name)
    check_two_ranks(case, tmp_path)


# Other layouts of a checkpoint


def load(model_dir: Path | str) -> dict[str, torch.Tensor]:
    return load_model(ModelConfig.from_pretrained(str(model_dir)), str(model_dir)).state_dict()


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_in_one_tensor_load_alike(architecture: str, tmp_path: Path) -> None:
    """As transformers 5 keeps them in memory, and may save them."""
    config = dict(num_hidden_layers=2, mlp_only_layers=[1]) if architecture.startswith("Qwen") else {}
    separate, fused = tmp_path / "separate", tmp_path / "fused"
    model = transformers.AutoModelForCausalLM.from_pretrained(make_tiny(architecture, separate, **config))
    model.save_pretrained(fused, save_original_format=False)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in load_file(fused / "model.safetensors"))
    expected, ours = load(separate), load(fused)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


# MXFP4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp4_dequantizes_as_in_transformers(dtype: torch.dtype) -> None:
    blocks, scales = random_mxfp4(3, 10, 96)
    if dtype != torch.float16:
        scales = torch.arange(90).reshape(3, 10, 3).to(torch.uint8) * 2 + 60  # 2 ** -67 to 2 ** 111
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    weights = [("x_scales", scales), ("y_bias", torch.ones(2)), ("x_blocks", blocks)]
    ours = dict(Mxfp4Config(QuantizedModel()).translate(weights, dtype, "cpu"))  # no layer of it takes blocks
    assert ours.keys() == {"x", "y_bias"}
    assert ours["x"].dtype == dtype and torch.equal(ours["x"], expected)


def test_an_mxfp4_scale_of_255_is_not_a_number() -> None:
    blocks, scales = random_mxfp4(1, 2, 64)
    scales[0, 1, 0] = 255
    values = mxfp4.dequantize(blocks, scales, torch.bfloat16)
    assert values[0, 1, :32].isnan().all() and values.isnan().sum() == 32


def test_mxfp4_keeps_its_bits() -> None:
    """In GGUF's blocks, each with the values that it had."""
    blocks, scales = random_mxfp4(3, 10, 96)
    kept = mxfp4.to_blocks(blocks, scales)
    assert kept.nbytes == 3 * 10 * 3 * 17
    assert torch.equal(dequantize_blocks(kept, "MXFP4"), mxfp4.dequantize(blocks, scales, torch.float32))
    scales[2, 0, 1] = 255
    with pytest.raises(ValueError, match="a scale is 255, not a number"):
        mxfp4.to_blocks(blocks, scales)


def test_mxfp4_takes_a_quarter_of_the_memory(tmp_path: Path) -> None:
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    quantized.mkdir()
    config = dict(num_hidden_layers=1, hidden_size=64, intermediate_size=96, dtype="bfloat16")
    quantize(Path(make_tiny("GptOssForCausalLM", plain, **config)), quantized)
    model = load_model(ModelConfig.from_pretrained(str(quantized)), str(quantized))
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    values = sum(experts.num_experts * rows * columns for rows, columns in ((192, 64), (64, 96)))
    assert sum(packed.nbytes for packed in experts.packed.values()) == values * 17 // 32


def test_ranks_that_would_share_a_group_are_refused() -> None:
    config = Mxfp4Config(QuantizedModel())
    with pytest.raises(ValueError, match=r"experts\.w2: 48 of 96 inputs .* groups of 32; use a smaller --tp-size"):
        FusedMoE(2, 64, 96, quant_config=config, prefix="layers.0.experts", tp_group=RankGroup(0, 2))


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (torch.zeros(2, 3, 4, 8, dtype=torch.uint8), torch.zeros(2, 3, 4, dtype=torch.uint8), r"\[2, 3, 4, 8\]"),
        (torch.zeros(2, 3, 4, 16, dtype=torch.uint8), torch.zeros(2, 3, 5, dtype=torch.uint8), r"\[2, 3, 5\]"),
        (torch.zeros(2, 3, 4, 16, dtype=torch.uint8), torch.zeros(2, 3, 4), r"torch\.float32"),
    ],
)
def test_mxfp4_of_other_shapes_or_dtypes_is_refused(blocks: torch.Tensor, scales: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"x_blocks and x_scales: .*{message}"):
        list(
            Mxfp4Config(QuantizedModel()).translate([("x_blocks", blocks), ("x_scales", scales)], torch.float32, "cpu")
        )


def test_mxfp4_blocks_without_scales_are_named(tmp_path: Path) -> None:
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    quantized.mkdir()
    quantize(Path(make_tiny("GptOssForCausalLM", plain, num_hidden_layers=1)), quantized)
    (quantized / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightLoadError, match=r"(?s)experts\.down_proj_blocks .*parameters were not set.*w2_mxfp4"):
        load(quantized)


def test_packed_weights_do_not_decide_the_dtype(tmp_path: Path) -> None:
    """gpt-oss's config.json does not name one."""
    make_tiny("GptOssForCausalLM", tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"x_blocks": torch.zeros(99, dtype=torch.uint8), "y": torch.zeros(3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert ModelConfig.from_pretrained(str(tmp_path)).dtype == "bfloat16"


def test_other_quantization_is_refused(tmp_path: Path) -> None:
    make_tiny("MixtralForCausalLM", tmp_path, num_hidden_layers=1, quantization_config={"quant_method": "hqq"})
    with pytest.raises(ValueError, match=r"is quantized by 'hqq', which is not supported; have .*mxfp4"):
        load(tmp_path)
