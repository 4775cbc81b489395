"""Pooled outputs of hidden states, against sums by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rtp_llm.srt.layers.pooler import First, Mean, Pooler, SideBySide, Steps, classifiers

COUNTS = [3, 1, 4]
STATES = torch.randn(sum(COUNTS), 6, generator=torch.Generator().manual_seed(0))
ROWS = STATES.split(COUNTS)


def pooled(pooler: Pooler, **options: object) -> torch.Tensor:
    return pooler(STATES, torch.tensor(COUNTS), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "of_row"),
    [
        ("cls", lambda row: row[0]),
        ("last", lambda row: row[-1]),
        ("mean", lambda row: row.mean(0)),
        ("mean_sqrt", lambda row: row.sum(0) / len(row) ** 0.5),
        ("max", lambda row: row.amax(0)),
        ("weighted_mean", lambda row: sum((i + 1) * x for i, x in enumerate(row)) / sum(range(1, len(row) + 1))),
    ],
)
def test_reductions(name: str, of_row: object) -> None:
    expected = torch.stack([of_row(row) for row in ROWS])  # type: ignore[operator]
    torch.testing.assert_close(pooled(Pooler(name, 6)), expected)


def test_each_token_has_a_line() -> None:
    pooler = Pooler("all", 6)
    assert pooler.per_token and torch.equal(pooled(pooler), STATES)


def test_several_reductions_stand_side_by_side() -> None:
    expected = torch.stack([torch.cat([row[0], row.mean(0)]) for row in ROWS])
    torch.testing.assert_close(pooled(Pooler(SideBySide([First(), Mean()]), 12)), expected)


def test_which_tokens_are_read() -> None:
    ids = np.array([7, 3, 9, 3])
    positions = {name: Pooler(name, 6).positions(ids).tolist() for name in ("cls", "last", "mean", "all")}
    assert positions == {"cls": [0], "last": [3], "mean": [0, 1, 2, 3], "all": [0, 1, 2, 3]}
    assert Pooler(Steps(3), 6).positions(ids).tolist() == [1, 3]
    assert [Pooler(name, 6).reads_prefix for name in ("cls", "last", "mean")] == [True, False, True]


def test_vectors_are_cut_and_then_get_length_one() -> None:
    pooler = Pooler("mean", 6, finish="normalize")
    raw = torch.stack([row.mean(0) for row in ROWS])
    torch.testing.assert_close(pooled(pooler, normalize=False), raw)
    short = raw[:, :2] / raw[:, :2].norm(dim=1, keepdim=True)
    torch.testing.assert_close(pooled(pooler, dimensions=2), short)
    unfinished = Pooler("mean", 6, finish="normalize", is_finished=False)
    torch.testing.assert_close(pooled(unfinished), raw)
    torch.testing.assert_close(pooled(unfinished, normalize=True), pooled(pooler))


def test_a_head_computes_in_its_own_dtype() -> None:
    head = nn.Linear(6, 2, dtype=torch.bfloat16)
    out = pooled(Pooler("cls", 2, head))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, head(torch.stack([row[0] for row in ROWS]).bfloat16()).float())


@pytest.mark.parametrize(
    ("num_labels", "problem", "finish"),
    [
        (1, None, torch.sigmoid),
        (3, None, lambda x: x.softmax(-1)),
        (3, "single_label_classification", lambda x: x.softmax(-1)),
        (3, "multi_label_classification", torch.sigmoid),
        (1, "regression", lambda x: x),
    ],
)
def test_probabilities_are_what_the_configuration_says(num_labels: int, problem: str | None, finish: object) -> None:
    config = SimpleNamespace(num_labels=num_labels, problem_type=problem)
    poolers = classifiers(config, "cls", nn.Linear(6, num_labels))
    assert list(poolers) == (["classify", "score"] if num_labels == 1 else ["classify"])
    raw = pooled(poolers["classify"], normalize=False)
    torch.testing.assert_close(pooled(poolers["classify"]), finish(raw))  # type: ignore[operator]


@pytest.mark.parametrize(
    "settings",
    [
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}},
    ],
)
def test_a_cross_encoder_names_its_last_function(settings: dict[str, object]) -> None:
    poolers = classifiers(SimpleNamespace(num_labels=1, **settings), "cls", nn.Linear(6, 1))
    torch.testing.assert_close(pooled(poolers["score"]), pooled(poolers["score"], normalize=False))
    unknown = SimpleNamespace(num_labels=1, sbert_ce_default_activation_function="torch.nn.Softplus")
    with pytest.raises(ValueError, match=r"the last function must be one of .* not 'torch.nn.Softplus'"):
        classifiers(unknown, "cls", nn.Linear(6, 1))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown pooling 'mid'; have"):
        Pooler("mid", 6)
    with pytest.raises(ValueError, match="unknown pooling 'tan'; have"):
        Pooler("cls", 6, finish="tan")
