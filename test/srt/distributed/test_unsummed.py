"""Sums that wait for a norm: whoever uses one first computes it, once, and sees a plain tensor."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rtp_llm.srt.distributed.parallel_state import RankGroup
from rtp_llm.srt.distributed.unsummed import NormOfSum, Unsummed, plain
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.layers.norm import GemmaRMSNorm, LayerNorm, RMSNorm


class Doubled:
    """Two ranks with the same summands."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def defers(self, x: torch.Tensor) -> bool:
        return x.dim() > 1

    def all_reduce(self, x: torch.Tensor) -> bool:
        self.calls.append("sum")
        x.mul_(2)
        return True

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x])

    def send_tokens(self, tokens: torch.Tensor, *routing: Any) -> None:
        return None

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, norm: NormOfSum) -> tuple[torch.Tensor, torch.Tensor]:
        assert type(x) is type(residual) is torch.Tensor
        self.calls.append(norm.kernel)
        result: tuple[torch.Tensor, torch.Tensor] = getattr(reference, f"add_{norm.kernel}")(
            2 * x, residual, norm.weight, norm.eps
        )
        return result


@pytest.fixture
def group() -> Iterator[RankGroup]:
    group = RankGroup(0, 2)
    group.shared = Doubled()
    with torch.inference_mode():
        yield group


def calls(group: RankGroup) -> list[str]:
    assert isinstance(group.shared, Doubled)
    return group.shared.calls


@pytest.mark.parametrize("kind", [RMSNorm, GemmaRMSNorm])
def test_a_norm_takes_the_sum(group: RankGroup, kind: type[RMSNorm]) -> None:
    norm, x, residual = kind(12), torch.randn(3, 12), torch.randn(3, 12)
    expected = norm(2 * x, residual)
    found = norm(group.all_reduce(x), residual)
    torch.testing.assert_close(found, expected)
    assert calls(group) == [norm.kernel] and all(type(each) is torch.Tensor for each in found)


def test_a_norm_of_another_kind_finds_it_summed(group: RankGroup) -> None:
    for norm in (LayerNorm(12), RMSNorm(12, var_hidden_size=8)):
        x, residual = torch.randn(3, 12), torch.randn(3, 12)
        expected = norm(2 * x, residual)
        found = norm(group.all_reduce(x), residual)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert calls(group) == ["sum", "sum"]


def test_a_first_layer_has_no_residual(group: RankGroup) -> None:
    norm, x = RMSNorm(12), torch.randn(3, 12)
    expected = 2 * x
    normed, residual = norm(group.all_reduce(x), None)
    assert torch.equal(residual, expected) and torch.equal(normed, norm(expected))
    later = norm(group.all_reduce(torch.ones(3, 12)), residual)
    assert torch.equal(later[1], expected + 2) and calls(group) == ["sum", "rms_norm"]


def test_any_other_use_finds_it_summed_once(group: RankGroup) -> None:
    x = torch.randn(3, 4)
    expected, found = 2 * x, group.all_reduce(x)
    assert isinstance(found, Unsummed) and calls(group) == []
    assert torch.equal(found + 1, expected + 1) and type(found + 1) is torch.Tensor
    assert torch.equal(torch.cat([found, found]), torch.cat([expected, expected]))
    assert found.view(2, 6).shape == (2, 6) and found.data_ptr() == x.data_ptr() and found.tolist() == expected.tolist()
    assert torch.nn.functional.linear(found, torch.eye(4)).equal(expected)
    found += 1
    assert torch.equal(found, expected + 1)
    assert calls(group) == ["sum"]


def test_groups_take_what_is_unsummed(group: RankGroup) -> None:
    x = torch.ones(2, 3)
    assert torch.equal(group.all_gather(group.all_reduce(x), 0), torch.full((4, 3), 2.0))
    assert torch.equal(plain(group.all_reduce(group.all_reduce(torch.ones(2, 3)))), torch.full((2, 3), 4.0))
    assert type(group.all_reduce(torch.ones(3))) is torch.Tensor
