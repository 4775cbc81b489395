"""Routing rules and routers, each against its formula, token by token."""

import pytest
import torch
import torch.nn.functional as F

from rtp_llm.srt.layers.routing import (
    Routing,
    TopK,
    TopKRouter,
    sigmoid_grouped_topk,
    sigmoid_topk,
    softmax_grouped_topk,
    softmax_topk,
)

EXPERTS, TOP_K = 12, 4


def dense(routing: Routing) -> torch.Tensor:
    """[T, EXPERTS]: weights at their experts, whatever the order within a token."""
    weights, ids = routing
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64 and weights.shape == ids.shape
    return torch.zeros(len(ids), EXPERTS).scatter(1, ids, weights)


@pytest.mark.parametrize("renormalize", [True, False])
def test_plain_sigmoid(renormalize: bool) -> None:
    logits = torch.randn(7, EXPERTS)
    expected = torch.zeros(7, EXPERTS)
    for token, row in enumerate(logits):
        best = row.argsort(descending=True)[:TOP_K]
        weights = row[best].sigmoid()
        expected[token, best] = weights / weights.sum() if renormalize else weights
    torch.testing.assert_close(dense(sigmoid_topk(logits, TOP_K, renormalize)), expected)
    torch.testing.assert_close(dense(TopK(TOP_K, "sigmoid", renormalize)(logits)), expected)


def test_a_rule_is_the_functions() -> None:
    logits, bias = torch.randn(7, EXPERTS), torch.randn(EXPERTS)
    for renormalize in (True, False):
        plain = TopK(TOP_K, renormalize=renormalize)(logits)
        assert torch.equal(dense(plain), dense(softmax_topk(logits, TOP_K, renormalize)))
        grouped = TopK(TOP_K, "softmax", renormalize, None, 4, 2, 2.5)(logits)
        assert torch.equal(dense(grouped), dense(softmax_grouped_topk(logits, TOP_K, 4, 2, renormalize, 2.5)))
        biased = TopK(TOP_K, "sigmoid", renormalize, bias, 4, 2, 2.5)(logits)
        assert torch.equal(dense(biased), dense(sigmoid_grouped_topk(logits, bias, TOP_K, 4, 2, renormalize, 2.5)))


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_a_correction_only_chooses(scoring_func: str) -> None:
    logits, bias = torch.randn(7, EXPERTS), torch.randn(EXPERTS)
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    expected = torch.zeros(7, EXPERTS)
    for token in range(7):
        best = (scores[token] + bias).argsort(descending=True)[:TOP_K]
        expected[token, best] = 3.0 * scores[token, best] / scores[token, best].sum()
    rule = TopK(TOP_K, scoring_func, renormalize=True, correction_bias=bias, routed_scaling_factor=3.0)
    torch.testing.assert_close(dense(rule(logits)), expected)


def test_an_unknown_score() -> None:
    with pytest.raises(ValueError, match=r"unknown scoring_func 'tanh'; have \['sigmoid', 'softmax'\]"):
        TopK(2, "tanh")


def test_a_router_has_its_weights() -> None:
    router = TopKRouter(
        6, EXPERTS, TOP_K, "sigmoid", True, has_correction_bias=True, bias=True, params_dtype=torch.float32
    )
    weight, bias, correction = torch.randn(EXPERTS, 6), torch.randn(EXPERTS), torch.randn(EXPERTS)
    tensors = {"weight": weight, "bias": bias, "e_score_correction_bias": correction}
    assert dict(router.named_parameters()).keys() == tensors.keys()
    for name, tensor in tensors.items():
        param = router.get_parameter(name)
        param.weight_loader(param, tensor)
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    expected = TopK(TOP_K, "sigmoid", True, correction)(F.linear(x.float(), weight, bias))
    torch.testing.assert_close(dense(router(x)), dense(expected))
