"""How layers are divided into stages, and what is refused."""

from pathlib import Path

import pytest
import torch
from stepped_core import Core, mixed_requests

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.distributed.parallel_state import SplitError, WorldShape
from rtp_llm.srt.models.loader import check_split
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.models.stages import StagePlan, _equal_bytes, _equal_numbers, _header, plan_stages
from rtp_llm.srt.models.weightless import build_without_weights
from tiny_models import TINY_MODELS, make_tiny, tiny_model


def config_of(model_dir: str) -> ModelConfig:
    return ModelConfig.from_pretrained(model_dir, dtype="float32")


def test_equal_numbers() -> None:
    assert _equal_numbers(4, 2) == (0, 2, 4)
    assert _equal_numbers(7, 3) == (0, 3, 5, 7)
    assert _equal_numbers(3, 3) == (0, 1, 2, 3)


def test_equal_bytes() -> None:
    assert _equal_bytes([1, 1, 1, 1], 2, head=0) == (0, 2, 4)
    assert _equal_bytes([1, 1, 1, 1], 2, head=2) == (0, 3, 4)  # the last stage has the head as well
    assert _equal_bytes([5, 1, 1, 1], 2, head=0) == (0, 1, 4)
    assert _equal_bytes([1, 1, 1, 1, 1, 1, 1], 3, head=0) == (0, 2, 4, 7)
    assert _equal_bytes([3, 1, 2], 3, head=9) == (0, 1, 2, 3)  # each has a layer at least


@pytest.mark.parametrize("seed", range(5))
def test_equal_bytes_are_as_even_as_they_can_be(seed: int) -> None:
    sizes = torch.randint(1, 20, (7,), generator=torch.Generator().manual_seed(seed)).tolist()
    bounds = _equal_bytes(sizes, 3, head=5)

    def largest(first: int, second: int) -> int:
        return max(sum(sizes[:first]), sum(sizes[first:second]), sum(sizes[second:]) + 5)

    assert largest(*bounds[1:3]) == min(largest(a, b) for a in range(1, 6) for b in range(a + 1, 7))


def test_what_cannot_be_in_stages_is_named(tmp_path: Path) -> None:
    llama = config_of(tiny_model("llama-tp"))
    with pytest.raises(SplitError, match=r"model.layers has \d layers, fewer than pp_size 9"):
        check_split(llama, WorldShape(pipeline=9))
    with pytest.raises(SplitError, match="cannot be shared by ranks: use --tp-size 1 and --pp-size 1"):
        check_split(llama, WorldShape(pipeline=2), model_impl="transformers")
    with pytest.raises(SplitError, match="stages need one list of layers with a cache, but there are: none"):
        plan_stages(torch.nn.Linear(2, 2), 2)
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    shared = config_of(make_tiny("Gemma4ForCausalLM", tmp_path, **kinds))
    with pytest.raises(SplitError, match=r"layers \[0, 2\] share the cache of layer 0, and cannot be in several"):
        check_split(shared, WorldShape(pipeline=2))


def test_layers_are_found_by_what_they_keep() -> None:
    config = config_of(tiny_model("llama-tp"))
    model_class, _ = ModelRegistry.resolve_model_cls(config.architectures)
    plan = plan_stages(build_without_weights(model_class, config), 2)
    assert plan == StagePlan("model.layers", (0, 2, config.num_layers)) and plan.layers_of(0) == range(2)


def test_a_result_that_cannot_be_sent_is_refused() -> None:
    header, tensors = _header((torch.zeros(3, 2), None, torch.ones(4, dtype=torch.int64)))
    assert header[0] == 3 and [tensor.shape for tensor in tensors] == [(3, 2), (4,)]
    with pytest.raises(TypeError, match="must return a tensor or up to"):
        _header({"hidden": torch.zeros(1)})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="returned str, which cannot be sent"):
        _header((torch.zeros(1), "x"))  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [0, 1])
def test_requests_of_every_kind(depth: int) -> None:
    """As one rank answers: drawn tokens, penalties, log-probabilities and cached prefixes, with two steps in flight."""
    requests = mixed_requests(TINY_MODELS["llama-tp"].vocab_size)
    whole, staged = Core("llama-tp"), Core("llama-tp", depth, threads=True, pp_size=2)
    try:
        assert staged.run(requests) == whole.run(requests)
        report = staged.core._meter.report()
        assert len(report.stage_usage) == 2 and all(0 <= used <= 1 for used in report.stage_usage)
    finally:
        staged.close()


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("options", [{"pp_size": 2}, {"pp_size": 2, "tp_size": 2}], ids=str)
def test_stages_in_processes(options: dict[str, int]) -> None:
    requests = mixed_requests(TINY_MODELS["llama-tp"].vocab_size)
    whole, staged = Core("llama-tp"), Core("llama-tp", 1, processes=True, **options)
    try:
        assert staged.run(requests) == whole.run(requests)
    finally:
        staged.close()
