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
    DATA,
    EXPERT,
    EXPERT_TENSOR,
    GROUPS,
    PIPELINE,
    TENSOR,
    RankGroup,
    World,
    WorldShape,
    destroy_world,
    divide,
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    init_world,
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
    start_ranks(2, tmp_path)


def test_groups_of_four_ranks(tmp_path: Path) -> None:
    """Two stages of two ranks, which have a half of the experts each."""
    start_ranks(4, tmp_path)


def start_ranks(num_ranks: int, folder: Path) -> None:
    """Run this file as a process for each rank."""
    search_path = os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)])  # as pytest's own
    environment = os.environ | {"PYTHONPATH": search_path}
    logs = [folder / f"rank-{rank}" for rank in range(num_ranks)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("wb") as file:
            command = [__file__, str(num_ranks), str(rank), str(folder)]
            ranks.append(WarmPython(command, folder, environment, file.fileno(), file.fileno()))
    assert [rank.wait(120) for rank in ranks] == [0] * num_ranks, "\n".join(log.read_text() for log in logs)


def one_rank_logits(name: str) -> torch.Tensor:
    model_dir = tiny_model(name)
    [prompt] = random_prompts(TINY_MODELS[name].vocab_size, [PROMPT_LEN])
    return run_step(build_model(model_dir), make_batch(prompt, 0, PROMPT_LEN)).next_token_logits


def test_one_rank_is_the_default() -> None:
    x = torch.randn(2, 3)
    assert (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()) == (0, 1)
    assert tensor_model_parallel_all_reduce(x) is x and tensor_model_parallel_all_gather(x) is x


def test_a_group_of_one_needs_no_meeting_place() -> None:
    world = init_world(0, WorldShape(), "gloo", "", timeout_s=1)
    assert get_tp_group() is world.group(TENSOR) and not torch.distributed.is_initialized()
    destroy_world()


def test_errors() -> None:
    with pytest.raises(ValueError, match="hidden size 7 is not divisible by 2"):
        divide(7, 2, "hidden size")
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        RankGroup(2, 2)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 4\), got 4"):
        init_world(4, WorldShape(2, 2), "gloo", "", timeout_s=1)
    with pytest.raises(ValueError, match="ep_size 2 does not divide tp_size 3"):
        WorldShape(tensor=3, expert=2)
    with pytest.raises(ValueError, match="requests of their own divide experts, and nothing else"):
        WorldShape(tensor=2, expert=4, data=4)
    with pytest.raises(ValueError, match="at least 1"):
        WorldShape(tensor=0)
    with pytest.raises(ValueError, match=r"unknown group 'model'; have \['tensor'"):
        WorldShape().members("model")
    with pytest.raises(ValueError, match=r"unknown distributed backend 'post'; have \['gloo'"):
        init_world(0, WorldShape(2), "post", "", timeout_s=1)


def test_members_of_groups() -> None:
    shape = WorldShape(tensor=4, pipeline=2, expert=2)
    assert shape.members(TENSOR) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert shape.members(PIPELINE) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert shape.members(EXPERT_TENSOR) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert shape.members(EXPERT) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert (shape.size, shape.stage_of(3), shape.stage_of(4)) == (8, 0, 1)
    assert shape.members(DATA) == [[rank] for rank in range(8)]
    own_requests = WorldShape(expert=3, data=3)
    assert own_requests.members(EXPERT) == own_requests.members(DATA) == [[0, 1, 2]]
    assert own_requests.members(TENSOR) == own_requests.members(PIPELINE) == [[0], [1], [2]]


@pytest.mark.parametrize(
    "shape", [WorldShape(3, 2, 3), WorldShape(4, 1, 2), WorldShape(6, 4, 2), WorldShape(1, 1, 4, 4), WorldShape()]
)
def test_every_rank_is_in_one_group_of_each_kind(shape: WorldShape) -> None:
    for name in GROUPS:
        assert sorted(rank for members in shape.members(name) for rank in members) == list(range(shape.size))
    for rank in range(shape.size):
        world = World.seen_by(rank, shape)
        assert world.group(TENSOR).world_size == shape.tensor
        assert world.group(PIPELINE).rank == shape.stage_of(rank)
        for name in GROUPS:
            assert world.group(name).members[world.group(name).rank] == rank


# What each rank runs


def run_group_member(rank: int, folder: Path) -> None:
    shape = WorldShape(tensor=2, pipeline=2, expert=2)
    world = init_world(rank, shape, "gloo", f"file://{folder}/meeting", timeout_s=60)
    try:
        for name in GROUPS:
            group = world.group(name)
            [members] = [ranks for ranks in shape.members(name) if rank in ranks]
            total = group.all_reduce(torch.tensor([10.0**rank]))
            assert total.item() == sum(10.0**member for member in members)
            gathered = group.all_gather(torch.tensor([rank]))
            assert gathered.tolist() == members
            received = group.all_to_all(torch.full((len(members), 2), rank), [[1] * len(members)] * len(members))
            assert received.tolist() == [[member] * 2 for member in members]
        check_stages_pass_tensors(world.group(PIPELINE), rank)
    finally:
        destroy_world()
    assert get_tp_group().world_size == get_pp_group().world_size == 1


def check_stages_pass_tensors(stages: RankGroup, rank: int) -> None:
    assert (stages.is_first_rank, stages.is_last_rank) == (rank < 2, rank >= 2)
    if stages.is_first_rank:
        sent = [stages.send(torch.full((5, 3), float(10 * rank + i)), 1) for i in range(3)]  # before any is received
        for each in sent:
            each.wait()
        return
    for i in range(3):
        assert torch.equal(stages.receive(torch.empty(5, 3), 0), torch.full((5, 3), float(10 * (rank - 2) + i)))


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init_world(rank, WorldShape(2), "gloo", f"file://{folder}/meeting", timeout_s=60)
    try:
        check_exchanges(rank)
        check_layers()
        for name, expected in torch.load(folder / "expected.pt").items():
            torch.testing.assert_close(one_rank_logits(name), expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(RuntimeError, match="joined already"):
            init_world(rank, WorldShape(2), "gloo", "", timeout_s=1)
    finally:
        destroy_world()
    assert get_tensor_model_parallel_world_size() == 1


def check_exchanges(rank: int) -> None:
    assert (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()) == (rank, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mine = torch.arange(6, dtype=dtype).view(3, 2) + 10 * rank
        both = [torch.arange(6, dtype=dtype).view(3, 2) + 10 * r for r in range(2)]
        assert torch.equal(tensor_model_parallel_all_gather(mine), torch.cat(both, dim=-1))
        assert torch.equal(tensor_model_parallel_all_gather(mine.T, dim=0), torch.cat([b.T for b in both]))
        assert torch.equal(tensor_model_parallel_all_reduce(mine.clone()), both[0] + both[1])
        received = get_tp_group().all_to_all(mine, [[2, 1], [0, 3]])
        assert torch.equal(received, both[0][:2] if rank == 0 else torch.cat([both[0][2:], both[1]]))
    none = get_tp_group().all_to_all(torch.empty(0, 4), [[0, 0], [0, 0]])
    assert none.shape == (0, 4)
    with pytest.raises(ValueError, match=r"has 1 rows to send, but its counts are \[1, 1\]"):
        get_tp_group().all_to_all(torch.ones(1, 4), [[1, 1], [1, 1]])


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
    whole, split = make(RankGroup(0, 1)), make(get_tp_group(), **options)
    params = dict(split.named_parameters())
    for name, param in whole.named_parameters():
        param.data.normal_()
        params[name].weight_loader(params[name], param.data)
    outputs = [layer(x) for layer in (split, whole)]
    ours, expected = (output[0] if isinstance(output, tuple) else output for output in outputs)
    torch.testing.assert_close(ours, expected)


if __name__ == "__main__":
    num_ranks, rank = map(int, sys.argv[1:3])
    (run_rank if num_ranks == 2 else run_group_member)(rank, Path(sys.argv[3]))
