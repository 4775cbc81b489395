"""Every architecture with a model file, divided over ranks: each answers as transformers does.

Ranks are threads of this process, which exchange tensors as processes do (``test_tensor_parallel.py``).
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from plain_models import PLAIN_MODELS
from stepped_core import Core, greedy_requests
from thread_ranks import SumsWithNorms, ThreadGroup

from rtp_llm import ModelRegistry
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.distributed.parallel_state import SplitError, WorldShape
from rtp_llm.srt.engine.rank_meter import loads_of_layers
from rtp_llm.srt.models.loader import check_split
from tiny_models import assert_same_ids, make_tiny, random_prompts, reference, tiny_model

VOCAB_SIZE = 90  # ids of prompts lie below it
NEW_TOKENS = 6
QUICK = ("Gemma2ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM")
ROUTED = (
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GptOssForCausalLM",
    "KimiLinearForCausalLM", "MiniMaxForCausalLM", "MiniMaxM2ForCausalLM", "MixtralForCausalLM",
    "NemotronHForCausalLM", "Qwen3NextForCausalLM",
)  # fmt: skip
RENAMED = ("InternLM3ForCausalLM", "MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM")
ARCHITECTURES = [
    name
    for name in sorted(ModelRegistry.get_generating_archs())
    if name in RENAMED or name in PLAIN_MODELS or (hasattr(transformers, name) and name.endswith("CausalLM"))
]
WITH_EXPERTS = [name for name in ARCHITECTURES if name in ROUTED or "Moe" in name or "MoE" in name]
NEEDS_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="shared memory is Linux's")
IN_THREES = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "head_dim": 16}


def check_ranks(architecture: str, directory: Path, config: dict, shares_memory: bool = False, **options: Any) -> None:
    model_dir = make_tiny(architecture, directory, **config)
    prompts = random_prompts(VOCAB_SIZE, (3, 45))
    given = {"threads": True, "shares_memory": shares_memory, "max_running_requests": 4}
    core = Core(model_path=model_dir, **given, **options)
    try:
        answers = core.run(greedy_requests(prompts, NEW_TOKENS))
        if "ep_size" in options or "enable_dp_attention" in options:
            check_loads(core, options.get("ep_size", options["tp_size"]), "enable_dp_attention" in options)
    finally:
        core.close()
    for rid, ids in answers.items():
        expected = reference(model_dir, tuple(prompts[int(rid)]), NEW_TOKENS)
        assert_same_ids(ids, expected, f"{architecture}, {options}, request {rid}")


def check_loads(core: Core, num_parts: int, of_own_requests: bool) -> None:
    """Each expert's tokens are counted once, in each layer as many."""
    loads = loads_of_layers(core.executor.rpc("stats"), of_own_requests)
    stats = core.core._meter.report()
    assert loads and len({sum(load) for load in loads}) == 1
    assert stats.expert_tokens == [sum(of_expert) for of_expert in zip(*loads, strict=True)]
    assert 1 <= stats.expert_imbalance <= num_parts


@pytest.mark.parametrize("architecture", QUICK)
def test_two_ranks_quickly(architecture: str, tmp_path: Path) -> None:
    check_ranks(architecture, tmp_path, {}, tp_size=2)


@pytest.mark.parametrize(
    "architecture",
    [QUICK[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name != QUICK[0])],
)
def test_sums_that_wait_for_norms(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs: a norm may compute the sum before it, and whatever else uses one finds it summed."""
    sums = SumsWithNorms()
    monkeypatch.setattr(ThreadGroup, "all_reduce", lambda group, x: sums.of(group, x))
    check_ranks(architecture, tmp_path, {}, tp_size=2)
    assert sums.normed or architecture not in ("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensor_parallel(architecture: str, tp_size: int, tmp_path: Path) -> None:
    """Ids equal one rank's; with four ranks, each two share a key/value head."""
    check_ranks(architecture, tmp_path, {}, tp_size=tp_size)


def test_experts_of_their_own_quickly(tmp_path: Path) -> None:
    check_ranks("Qwen3MoeForCausalLM", tmp_path, {}, tp_size=2, ep_size=2)


@pytest.mark.parametrize(
    ("backend", "shares_memory"),
    [("none", False), ("all_to_all", False), pytest.param("all_to_all", True, marks=NEEDS_LINUX)],
)
def test_requests_of_their_own_quickly(backend: str, shares_memory: bool, tmp_path: Path) -> None:
    options = {"tp_size": 2, "enable_dp_attention": True, "moe_a2a_backend": backend}
    check_ranks("DeepseekV3ForCausalLM", tmp_path, {}, shares_memory, **options)


def test_what_cannot_be_divided_is_named(tmp_path: Path) -> None:
    model_dir = make_tiny("Qwen3MoeForCausalLM", tmp_path, num_local_experts=6)
    config = ModelConfig.from_pretrained(model_dir, dtype="float32")
    check_split(config, WorldShape(4, expert=2))
    check_split(config, WorldShape(2, expert=1))
    with pytest.raises(SplitError, match=r"on 4 ranks: model.layers.0.mlp.experts: number of experts 6 .* ep_size"):
        check_split(config, WorldShape(4, expert=4))
    with pytest.raises(SplitError, match="number of attention heads 4 is not divisible by 3; choose another tp_size"):
        check_split(config, WorldShape(3, expert=3))
    dense = ModelConfig.from_pretrained(tiny_model("llama-tp"), dtype="float32")
    with pytest.raises(SplitError, match="no experts that could be divided; use --ep-size 1"):
        check_split(dense, WorldShape(2, expert=2))
    with pytest.raises(SplitError, match="no experts that could be divided; leave --enable-dp-attention out"):
        check_split(dense, WorldShape(expert=2, data=2))


@pytest.mark.slow
@pytest.mark.parametrize(("tp_size", "ep_size"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_expert_parallel(architecture: str, tp_size: int, ep_size: int, tmp_path: Path) -> None:
    """Each rank has half of the experts, or, of four ranks, two share each half."""
    check_ranks(architecture, tmp_path, {}, tp_size=tp_size, ep_size=ep_size)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["none", "all_to_all"])
@pytest.mark.parametrize(("tp_size", "shares_memory"), [(2, False), pytest.param(4, True, marks=NEEDS_LINUX)])
@pytest.mark.parametrize("architecture", WITH_EXPERTS)
def test_requests_of_their_own(
    architecture: str, tp_size: int, shares_memory: bool, backend: str, tmp_path: Path
) -> None:
    """Each rank has its own requests, all of attention, and a part of the experts; two of four have no request."""
    options = {"tp_size": tp_size, "enable_dp_attention": True, "moe_a2a_backend": backend}
    check_ranks(architecture, tmp_path, {}, shares_memory, **options)


@pytest.mark.parametrize("depth", [0, 1])
def test_stages_quickly(depth: int, tmp_path: Path) -> None:
    check_ranks("Qwen3NextForCausalLM", tmp_path, {}, depth=depth, pp_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"pp_size": 2}, {"pp_size": 3, "pp_split": "bytes"}, {"pp_size": 2, "tp_size": 2}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stages(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    check_ranks(architecture, tmp_path, {}, depth=options["pp_size"] - 1, **options)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM"])
def test_three_ranks(architecture: str, tmp_path: Path) -> None:
    check_ranks(architecture, tmp_path, IN_THREES, tp_size=3)
