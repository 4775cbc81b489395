"""Two ranks over gloo against one: this file is also the program that each rank runs."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_forward import build_model, make_batch, run_step

from rtp_llm.srt.distributed.parallel_state import (
    TPGroup,
    destroy_tensor_parallel,
    divide,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    init_tensor_parallel,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from rtp_llm.srt.layers.embedding import VocabParallelEmbedding
from rtp_llm.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from rtp_llm.srt.layers.moe import FusedMoE, softmax_topk
from tiny_models import TINY_MODELS, random_prompts, tiny_model
from warm_python import WarmPython

TP_MODELS = [name for name in TINY_MODELS if name.endswith("-tp")]
PROMPT_LEN = 30
HELPERS = Path(__file__).resolve().parents[2] / "helpers"


def test_two_ranks_agree_with_one(tmp_path: Path) -> None:
    expected = {name: one_rank_logits(name) for name in TP_MODELS}
    torch.save(expected, tmp_path / "expected.pt")
    search_path = os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)])  # as pytest's own
    environment = os.environ | {"PYTHONPATH": search_path}
    logs = [tmp_path / f"rank-{rank}" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("wb") as file:
            command = [__file__, str(rank), str(tmp_path)]
            ranks.append(WarmPython(command, tmp_path, environment, file.fileno(), file.fileno()))
    assert [rank.wait(120) for rank in ranks] == [0, 0], "\n".join(log.read_text() for log in logs)


def one_rank_logits(name: str) -> torch.Tensor:
    model_dir = tiny_model(name)
    [prompt] = random_prompts(TINY_MODELS[name].vocab_size, [PROMPT_LEN])
    return run_step(build_model(model_dir), make_batch(prompt, 0, PROMPT_LEN)).next_token_logits


def test_one_rank_is_the_default() -> None:
    x = torch.randn(2, 3)
    assert (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()) == (0, 1)
    assert tensor_model_parallel_all_reduce(x) is x and tensor_model_parallel_all_gather(x) is x


def test_a_group_of_one_needs_no_meeting_place() -> None:
    group = init_tensor_parallel(0, 1, "gloo", "", timeout_s=1)
    assert get_tp_group() is group and not torch.distributed.is_initialized()
    destroy_tensor_parallel()


def test_errors() -> None:
    with pytest.raises(ValueError, match="hidden size 7 is not divisible by 2"):
        divide(7, 2, "hidden size")
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        TPGroup(2, 2)
    with pytest.raises(ValueError, match=r"unknown distributed backend 'post'; have \['gloo'"):
        init_tensor_parallel(0, 2, "post", "", timeout_s=1)


# What each rank runs


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init_tensor_parallel(rank, 2, "gloo", f"file://{folder}/meeting", timeout_s=60)
    try:
        check_exchanges(rank)
        check_layers()
        for name, expected in torch.load(folder / "expected.pt").items():
            torch.testing.assert_close(one_rank_logits(name), expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(RuntimeError, match="already initialised"):
            init_tensor_parallel(rank, 2, "gloo", "", timeout_s=1)
    finally:
        destroy_tensor_parallel()
    assert get_tensor_model_parallel_world_size() == 1


def check_exchanges(rank: int) -> None:
    assert (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()) == (rank, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mine = torch.arange(6, dtype=dtype).view(3, 2) + 10 * rank
        both = [torch.arange(6, dtype=dtype).view(3, 2) + 10 * r for r in range(2)]
        assert torch.equal(tensor_model_parallel_all_gather(mine), torch.cat(both, dim=-1))
        assert torch.equal(tensor_model_parallel_all_gather(mine.T, dim=0), torch.cat([b.T for b in both]))
        assert torch.equal(tensor_model_parallel_all_reduce(mine.clone()), both[0] + both[1])


def check_layers() -> None:
    """Each kind of layer, split over the two ranks, against the same layer whole."""
    torch.manual_seed(0)  # all ranks draw the same tensors
    x, ids = torch.randn(5, 8), torch.tensor([0, 6, 3, 4, 5])
    gathered = {"gather_output": True}
    compare(lambda group, **options: ColumnParallelLinear(8, 6, tp_group=group, **options), x, gathered)
    compare(lambda group, **options: MergedColumnParallelLinear(8, [4, 6], tp_group=group, **options), x, gathered)
    compare(lambda group: RowParallelLinear(8, 6, input_is_parallel=False, tp_group=group), x, {})
    compare(lambda group: VocabParallelEmbedding(7, 3, tp_group=group), ids, {})
    compare(lambda group: RoutedExperts(5, 8, 6, bias=True, tp_group=group), x, {})
    qkv = QKVParallelLinear(8, 3, 4, 1, bias=False)
    whole = torch.randn(18, 8)
    qkv.weight.weight_loader(qkv.weight, whole)
    rank = get_tensor_model_parallel_rank()
    expected = torch.cat((whole[:12].view(2, 6, 8)[rank], whole[12:]))
    torch.testing.assert_close(qkv(x)[0], x @ expected.T)


class RoutedExperts(FusedMoE):
    """Routes by the first components, to have one argument as other layers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, *softmax_topk(x[:, : self.num_experts], 2, renormalize=True))


def compare(make: Callable[..., torch.nn.Module], x: torch.Tensor, options: dict[str, Any]) -> None:
    whole, split = make(TPGroup(0, 1)), make(get_tp_group(), **options)
    params = dict(split.named_parameters())
    for name, param in whole.named_parameters():
        param.data.normal_()
        params[name].weight_loader(params[name], param.data)
    outputs = [layer(x) for layer in (split, whole)]
    ours, expected = (output[0] if isinstance(output, tuple) else output for output in outputs)
    torch.testing.assert_close(ours, expected)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
