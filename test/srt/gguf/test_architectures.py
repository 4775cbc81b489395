"""Every architecture that GGUF has, served from a file as llama.cpp's converter writes it, against transformers.

Each case is a tiny checkpoint. Transformers answers from its folder; we answer from the GGUF that is made of it, and
know nothing of the folder. Weights are float32 in both, so ids must be equal and log-probabilities close.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType
from gguf_recurrent import OF_CASES, RECURRENT, RECURRENT_CASES

from gguf_conversions import CONVERSIONS as OF_OTHERS
from gguf_writing import Conversion, write_gguf
from parity import (
    Case,
    Tensors,
    disturb_correction_biases,
    disturb_layer_scalars,
    generate,
    open_engine,
    params_of,
    rewrite_tensors,
    same_logprobs,
)
from rtp_llm.srt.configs.hf_config import load_hf_config
from rtp_llm.srt.configs.model_config import is_multimodal_model
from rtp_llm.srt.gguf.config import config_json
from rtp_llm.srt.gguf.file import GGUFFile
from rtp_llm.srt.models.loader import FALLBACK
from rtp_llm.srt.models.registry import ModelRegistry
from tiny_models import assert_same_ids, random_prompts, reference

FULL, WINDOW = "full_attention", "sliding_attention"
ORIGINAL_LEN = 53  # of LongRoPE: no prompt grows past it, where transformers computes all keys anew


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0} | parameters


def longrope(half: int, original: int = ORIGINAL_LEN) -> dict[str, Any]:
    factors = {
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [1.5 + 0.7 * i for i in range(half)],
    }
    return rope(rope_type="longrope", original_max_position_embeddings=original, **factors)


PHI_SCALE = math.sqrt(1 + math.log(512 / 400) / math.log(400))  # what the converter writes, whatever the model says
LINEAR = rope(rope_type="linear", factor=3.0)
YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
DEEPSEEK_YARN = YARN | dict(beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707)
LLAMA3 = rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
CORRECTED = dict(scoring_func="sigmoid")  # what these checkpoints say, and transformers' classes leave out


# Read by another class, which computes the same.
READ_AS = {
    "MistralForCausalLM": "LlamaForCausalLM",
    "InternLM3ForCausalLM": "LlamaForCausalLM",
    "Glm4MoeLiteForCausalLM": "DeepseekV3ForCausalLM",
}
# No GGUF has these.
WITHOUT_GGUF = {
    "DeepseekV32ForCausalLM": "the package `gguf` does not know `deepseek32` yet",
    **dict.fromkeys(
        (
            "GPTJForCausalLM",
            "OPTForCausalLM",
            "OlmoHybridForCausalLM",
        ),
        "llama.cpp has neither converter nor model",
    ),
    **dict.fromkeys(
        ("MiniMaxForCausalLM", "MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM"),
        "the package `gguf` does not know `minimax-01` yet",
    ),
    "PersimmonForCausalLM": "llama.cpp has dropped its converter and model",
}
CONVERSIONS = OF_OTHERS | RECURRENT
# What the keys of a file do not say, though config.json does, and what is computed instead.
NOT_SAID = {
    "Ernie4_5_MoeForCausalLM": "`moe_layer_end_index`, `moe_norm_min`: the class's own values",
    "FalconH1ForCausalLM": "the factors, which are in the weights; `mamba_norm_before_gate`: false, as in llama.cpp",
    "FalconForCausalLM": "`alibi`, for which there is no converter; the length of the context: 2,048 tokens",
    "GPT2LMHeadModel": "`activation_function`, `scale_attn_by_inverse_layer_idx`: the class's own values",
    "GPTBigCodeForCausalLM": "`activation_function`: the class's own value",
    "Gemma2ForCausalLM": "`query_pre_attn_scalar`: the size of heads, but for 27B; every other layer has a window",
    "Gemma3ForCausalLM": "`query_pre_attn_scalar`: the size of heads, but for 27B; every sixth layer sees all",
    "KimiLinearForCausalLM": "`linear_num_heads`: as many as of attention; `moe_renormalize`, `num_expert_group`, "
    "`topk_group`: the class's own values",
    "Lfm2MoeForCausalLM": "`norm_topk_prob`, `routed_scaling_factor`: the class's own values",
    "Llama4ForCausalLM": "`no_rope_layers`, `attention_chunk_size`: the class's own; `use_qk_norm`: by the experts",
    "MistralForCausalLM": "`sliding_window`: no window",
    "MixtralForCausalLM": "`sliding_window`: no window",
    "NemotronHForCausalLM": "`time_step_min`: no bound, as in llama.cpp",
    "PhimoeForCausalLM": "`short_mscale`, `long_mscale`: llama.cpp's factor",
    "Qwen2ForCausalLM": "`use_sliding_window`: no windows",
    "Qwen2MoeForCausalLM": "`decoder_sparse_step`, `mlp_only_layers`, `norm_topk_prob`: the class's own values",
    "Qwen3ForCausalLM": "`use_sliding_window`: no windows",
    "Qwen3MoeForCausalLM": "`decoder_sparse_step`, `mlp_only_layers`: the class's own values; `norm_topk_prob`: true",
    "Qwen3NextForCausalLM": "`decoder_sparse_step`, `mlp_only_layers`, `norm_topk_prob`: the class's own values",
    "SmolLM3ForCausalLM": "`no_rope_layers`: every fourth has no positions",
    "Starcoder2ForCausalLM": "`sliding_window`: no window",
}


def with_a_predictor(model_dir: str) -> None:
    """Checkpoints of GLM-4.5 have a layer more, which predicts a second token."""
    disturb_correction_biases(model_dir)

    def change(tensors: Tensors) -> Tensors:
        last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")}
        more = {name.replace("layers.3.", "layers.4."): tensor for name, tensor in last.items()}
        norms = {f"model.layers.4.{name}.weight": torch.ones(64) for name in ("enorm", "hnorm", "shared_head.norm")}
        return tensors | more | norms | {"model.layers.4.eh_proj.weight": torch.ones(64, 128)}

    rewrite_tensors(model_dir, change)


def with_keys_of_all_layers(model_dir: str) -> None:
    """Checkpoints of Gemma 4 have keys and values in layers that take another's."""
    disturb_layer_scalars(model_dir)

    def change(tensors: Tensors) -> Tensors:
        more = {
            name.replace("layers.0.", "layers.2."): tensor
            for name, tensor in tensors.items()
            if name.startswith(("model.layers.0.self_attn.k", "model.layers.0.self_attn.v"))
        }
        assert more and not more.keys() & tensors.keys()
        return tensors | more

    rewrite_tensors(model_dir, change)


SlowCase = partial(Case, slow=True)
CASES = (
    Case("llama", "LlamaForCausalLM", dict(num_key_value_heads=1, rope_parameters=LLAMA3)),
    SlowCase("llama-tied-linear", "LlamaForCausalLM", dict(tie_word_embeddings=True, rope_parameters=LINEAR)),
    SlowCase("llama-biases-yarn", "LlamaForCausalLM", dict(attention_bias=True, mlp_bias=True, rope_parameters=YARN)),
    SlowCase("mistral", "MistralForCausalLM", dict(sliding_window=None, head_dim=24)),
    SlowCase("mixtral", "MixtralForCausalLM", dict(sliding_window=None)),
    SlowCase("internlm3", "InternLM3ForCausalLM", {}),
    SlowCase("apertus", "ApertusForCausalLM", dict(rope_parameters=LLAMA3)),
    SlowCase("bailing", "BailingMoeForCausalLM", dict(first_k_dense_replace=0, num_shared_experts=2)),
    SlowCase(
        "bailing-2",
        "BailingMoeV2ForCausalLM",
        dict(num_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, routed_scaling_factor=2.5)
        | dict(use_qk_norm=True, partial_rotary_factor=0.5),
    ),
    SlowCase("bloom", "BloomForCausalLM", dict(seq_length=512)),
    SlowCase("cohere2", "Cohere2ForCausalLM", dict(sliding_window=7, logit_scale=0.25, rotary_pct=1.0)),
    Case(
        "deepseek-2",
        "DeepseekV2ForCausalLM",
        dict(rope_parameters=DEEPSEEK_YARN, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
        | dict(topk_method="group_limited_greedy", routed_scaling_factor=1.5),
    ),
    SlowCase("deepseek-2-lite", "DeepseekV2ForCausalLM", dict(q_lora_rank=None, topk_method="greedy")),
    SlowCase(
        "deepseek-3",
        "DeepseekV3ForCausalLM",
        CORRECTED
        | dict(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, rope_parameters=DEEPSEEK_YARN),
        edit=disturb_correction_biases,
    ),
    SlowCase(
        "glm4-moe-lite",
        "Glm4MoeLiteForCausalLM",
        CORRECTED | dict(first_k_dense_replace=1),
        edit=disturb_correction_biases,
    ),
    SlowCase("ernie4.5", "Ernie4_5ForCausalLM", {}),
    SlowCase("ernie4.5-moe", "Ernie4_5_MoeForCausalLM", dict(moe_k=3), edit=disturb_correction_biases),
    SlowCase("exaone4", "Exaone4ForCausalLM", dict(sliding_window=7, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    SlowCase(
        "exaone4-no-window",
        "Exaone4ForCausalLM",
        dict(sliding_window=None, sliding_window_pattern=None, layer_types=[FULL] * 4),
    ),
    SlowCase("falcon-7b", "FalconForCausalLM", dict(num_kv_heads=1)),
    SlowCase("falcon-40b", "FalconForCausalLM", dict(num_kv_heads=2, new_decoder_architecture=True)),
    Case("gpt2", "GPT2LMHeadModel", dict(n_ctx=512)),
    SlowCase("starcoder", "GPTBigCodeForCausalLM", {}),
    Case("gpt-neox", "GPTNeoXForCausalLM", dict(rotary_pct=0.25)),
    SlowCase("gpt-neox-one-by-one", "GPTNeoXForCausalLM", dict(rotary_pct=0.25, use_parallel_residual=False)),
    SlowCase(
        "gemma2",
        "Gemma2ForCausalLM",
        dict(sliding_window=7, query_pre_attn_scalar=16, attn_logit_softcapping=3.0, final_logit_softcapping=2.5),
    ),
    Case(
        "gemma3",
        "Gemma3ForCausalLM",
        dict(sliding_window=7, query_pre_attn_scalar=24, head_dim=24, num_hidden_layers=7)
        | dict(rope_parameters={WINDOW: rope(), FULL: LINEAR | dict(rope_theta=1e6)}),
    ),
    SlowCase(
        "gemma4",
        "Gemma4ForCausalLM",
        dict(layer_types=[WINDOW, FULL, WINDOW, FULL], num_kv_shared_layers=2, use_double_wide_mlp=True)
        | dict(global_head_dim=24, sliding_window=7, final_logit_softcapping=3.0),
        edit=with_keys_of_all_layers,
    ),
    SlowCase(
        "gemma4-moe",
        "Gemma4ForCausalLM",
        dict(layer_types=[WINDOW, WINDOW, FULL], num_hidden_layers=3, sliding_window=16, hidden_size_per_layer_input=0)
        | dict(attention_k_eq_v=True, num_global_key_value_heads=1, global_head_dim=20, num_key_value_heads=4)
        | dict(enable_moe_block=True, num_experts=5, top_k_experts=3, moe_intermediate_size=36),
        edit=disturb_layer_scalars,
    ),
    SlowCase("glm4", "Glm4ForCausalLM", dict(rope_parameters=rope(partial_rotary_factor=0.5))),
    SlowCase(
        "glm4-moe",
        "Glm4MoeForCausalLM",
        dict(use_qk_norm=True, attention_bias=True, routed_scaling_factor=1.7, head_dim=16),
        edit=with_a_predictor,
    ),
    Case("gpt-oss", "GptOssForCausalLM", dict(sliding_window=7, rope_parameters=YARN | dict(truncate=False))),
    SlowCase(
        "granite",
        "GraniteForCausalLM",
        dict(embedding_multiplier=6.0, attention_multiplier=0.4, residual_multiplier=0.6, logits_scaling=3.0),
    ),
    SlowCase("granite-moe", "GraniteMoeForCausalLM", dict(attention_multiplier=0.2, residual_multiplier=0.5)),
    SlowCase(
        "granite-moe-shared",
        "GraniteMoeSharedForCausalLM",
        dict(attention_multiplier=0.2, residual_multiplier=0.5, tie_word_embeddings=True),
    ),
    SlowCase("hunyuan", "HunYuanDenseV1ForCausalLM", {}),
    SlowCase(
        "hunyuan-moe",
        "HunYuanMoEV1ForCausalLM",
        dict(moe_intermediate_size=[96] * 4, num_shared_expert=[1] * 4, moe_topk=[3] * 4),
    ),
    SlowCase("internlm2", "InternLM2ForCausalLM", dict(rope_theta=500.0)),
    SlowCase("llama4", "Llama4ForCausalLM", dict(interleave_moe_layer_step=2)),
    SlowCase("minimax-2", "MiniMaxM2ForCausalLM", CORRECTED | dict(rotary_dim=8), edit=disturb_correction_biases),
    SlowCase("ministral3", "Ministral3ForCausalLM", dict(sliding_window=None)),
    SlowCase("mpt", "MptForCausalLM", {}),
    SlowCase("nemotron", "NemotronForCausalLM", {}),
    SlowCase("olmo2", "Olmo2ForCausalLM", {}),
    SlowCase("olmo3", "Olmo3ForCausalLM", dict(sliding_window=7)),
    SlowCase("olmoe", "OlmoeForCausalLM", {}),
    SlowCase("phi2", "PhiForCausalLM", dict(intermediate_size=256, num_key_value_heads=4)),
    SlowCase(
        "phi3-longrope",
        "Phi3ForCausalLM",
        dict(original_max_position_embeddings=ORIGINAL_LEN, sliding_window=None)
        | dict(rope_parameters=longrope(6) | {"partial_rotary_factor": 0.75}),
    ),
    SlowCase("phi3", "Phi3ForCausalLM", dict(original_max_position_embeddings=512, sliding_window=None)),
    SlowCase(
        "phimoe",
        "PhimoeForCausalLM",
        dict(attention_bias=True, lm_head_bias=True, sliding_window=None)
        | dict(rope_parameters=longrope(8, 400) | {"short_mscale": PHI_SCALE, "long_mscale": PHI_SCALE}),
    ),
    SlowCase("qwen2", "Qwen2ForCausalLM", dict(tie_word_embeddings=True)),
    Case("qwen2-moe", "Qwen2MoeForCausalLM", {}),
    SlowCase("qwen3", "Qwen3ForCausalLM", dict(head_dim=24)),
    SlowCase("qwen3-moe", "Qwen3MoeForCausalLM", dict(norm_topk_prob=True)),
    SlowCase("seed-oss", "SeedOssForCausalLM", {}),
    SlowCase("smollm3", "SmolLM3ForCausalLM", dict(sliding_window=None)),
    SlowCase("stablelm", "StableLmForCausalLM", dict(use_qkv_bias=True)),
    SlowCase("stablelm-parallel", "StableLmForCausalLM", dict(use_parallel_residual=True, qk_layernorm=True)),
    SlowCase("starcoder2", "Starcoder2ForCausalLM", dict(sliding_window=None)),
    *RECURRENT_CASES,
)


SLOW_BLOCKS = ("phi3", "gpt-oss", "deepseek-2", "granite-moe", "falcon-40b")  # fused, split, turned and stacked tensors
SLOW_BLOCKS += ("qwen3.5", "qwen3-next", "nemotron-h-moe", "falcon-h1", "lfm2")  # heads in another order, and columns

# Fields that say nothing of what is computed.
OF_NO_MATTER = {
    "_name_or_path",
    "pad_token_id",
    "architectures",
    "dtype",
    "initializer_range",
    "model_type",
    "transformers_version",
    "use_cache",
}
OF_NO_MATTER |= {"chunk_size", "mamba_chunk_size"}  # what is computed at once
OF_NO_MATTER |= {"bias", "n_ctx", "rotary_pct", "scoring_func", "sliding_window_pattern"}  # of old files and classes
# Fields that differ from the original's, and mean the same.
DIFFERENT = {
    "apertus": {"rope_parameters"},  # the factors that follow from it
    "bailing": {"partial_rotary_factor", "rope_parameters", "use_qk_norm"},  # all features are rotated
    "exaone4": {"rope_parameters"},
    "falcon-7b": {"max_position_embeddings", "num_ln_in_parallel_attn"},
    "falcon-40b": {"max_position_embeddings", "multi_query"},  # the newer form does not ask
    "falcon-h1": {  # they are in the weights
        "attention_in_multiplier",
        "attention_out_multiplier",
        "embedding_multiplier",
        "key_multiplier",
        "lm_head_multiplier",
        "mlp_multipliers",
        "ssm_in_multiplier",
        "ssm_multipliers",
        "ssm_out_multiplier",
    },
    "gemma4-moe": {"rope_parameters"},  # a part of 20 features of which as many are rotated
    "glm4-moe-lite": {"mlp_layer_types"},  # first_k_dense_replace
    "granite-hybrid": {"max_position_embeddings"},  # as many as there are: no layer has positions
    "granite-hybrid-dense": {"max_position_embeddings"},
    "gpt2": {"n_inner"},  # four times the width
    "hunyuan-moe": {"moe_intermediate_size", "moe_topk", "num_shared_expert"},  # one value for all layers
    "lfm2": {"block_auto_adjust_ff_dim", "block_multiple_of", "intermediate_size"},  # the size that they give
    "llama": {"rope_parameters"},
    "ministral3": {"rope_parameters"},  # the length of the context in it
    "nemotron-h": {"moe_intermediate_size", "n_routed_experts", "time_step_min"},  # there are no experts
    "nemotron-h-moe": {"intermediate_size", "time_step_min"},  # there are no blocks without experts
    "phi3-longrope": {"rope_parameters"},  # float32, and the factor of scores
    "phimoe": {"rope_parameters"},
    "starcoder": {"n_inner", "num_key_value_heads"},
}


@dataclass(frozen=True)
class Made:
    case: Case
    model_dir: str  # that transformers reads
    path: Path  # of the GGUF


@pytest.fixture(scope="module", params=params_of(CASES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case = request.param
    directory = tmp_path_factory.mktemp("gguf")
    model_dir = case.make(directory / "checkpoint")
    return Made(case, model_dir, write_gguf(model_dir, directory / "model.gguf", conversion_of(case)))


def conversion_of(case: Case) -> Conversion:
    return OF_CASES.get(case.name, CONVERSIONS[case.architecture])


def test_answers_are_those_of_transformers(made: Made) -> None:
    check_answers(made)


def test_a_file_with_latent_keys_and_values_in_one(tmp_path: Path) -> None:
    """The converter took them apart only from April 2025 on."""
    case = next(case for case in CASES if case.name == "deepseek-2")
    keys = {
        "attention.key_length": lambda config: config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "attention.value_length": "v_head_dim",
        "attention.head_count_kv": "num_attention_heads",
        "attention.key_length_mla": lambda config: None,
        "attention.value_length_mla": lambda config: None,
    }
    now = conversion_of(case)
    model_dir = case.make(tmp_path / "checkpoint")
    before = replace(now, keys=now.keys | keys, changes=())
    check_answers(Made(case, model_dir, write_gguf(model_dir, tmp_path / "model.gguf", before)))


def check_answers(made: Made) -> None:
    vocab_size = json.loads(Path(made.model_dir, "config.json").read_text())["vocab_size"]
    prompts = random_prompts(vocab_size, [40, 130])
    with open_engine(str(made.path)) as engine:
        results = generate(engine, prompts, max_new_tokens=4, return_logprob=True, logprob_start_len=0)
    for prompt, result in zip(prompts, results, strict=True):
        expected = reference(made.model_dir, tuple(prompt), 4)
        assert_same_ids(result["output_ids"], expected, f"{made.case.name}, prompt of {len(prompt)}")
        same_logprobs(result, expected)


def test_configuration_is_the_original_ones(made: Made, tmp_path: Path) -> None:
    content = config_json(GGUFFile.open(made.path))
    Path(tmp_path, "config.json").write_text(json.dumps(content))
    ours = load_hf_config(str(tmp_path), {}, False).to_dict()
    original = load_hf_config(made.model_dir, {}, False).to_dict()
    different = {name for name, value in original.items() if value != ours.get(name)} - OF_NO_MATTER
    assert different == DIFFERENT.get(made.case.name, set())
    assert content["architectures"] == [READ_AS.get(made.case.architecture, made.case.architecture)]


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["qwen2-moe", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_BLOCKS)])
def test_blocks_are_their_values(name: str, kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """In float32, a file of blocks answers as one of the values that they stand for."""
    case = next(case for case in CASES if case.name == name)
    model_dir = case.make(tmp_path / "checkpoint")
    blocks, values = (
        write_gguf(model_dir, tmp_path / f"{as_values}.gguf", conversion_of(case), kind, as_values)
        for as_values in (False, True)
    )
    prompt = random_prompts(90, [40])
    answers = []
    for path in (blocks, values):
        with open_engine(str(path)) as engine:
            answers += generate(engine, prompt, max_new_tokens=4, return_logprob=True, logprob_start_len=0)
    first, second = (answer["meta_info"]["input_token_logprobs"][1:] for answer in answers)
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert [one[0] for one in first] == pytest.approx([one[0] for one in second], abs=1e-4)


def test_every_architecture_has_a_case() -> None:
    generating = ModelRegistry.get_generating_archs() & set(ModelRegistry.models.layers[-1])
    ours = {name for name in generating if not is_multimodal_model(name)} - {FALLBACK}
    asked = {case.architecture for case in CASES}
    assert asked == CONVERSIONS.keys()
    assert ours == asked | WITHOUT_GGUF.keys()
    assert NOT_SAID.keys() <= asked


def test_forms_are_of_architectures_that_the_package_knows() -> None:
    assert ModelRegistry.gguf_architectures() <= set(MODEL_ARCH_NAMES.values())
    assert {conversion.architecture for conversion in CONVERSIONS.values()} <= ModelRegistry.gguf_architectures()
    # Else DeepSeek-V3.2 wants a form, and MiniMax-Text-01.
    assert not {"deepseek32", "minimax-01"} & set(MODEL_ARCH_NAMES.values())
