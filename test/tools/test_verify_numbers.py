"""Names that ``rtp-llm verify`` gives to factors and to orders of rows."""

import math
from types import SimpleNamespace

import pytest
import torch

from rtp_llm.tools.verify.locate import Difference, first_difference
from rtp_llm.tools.verify.number_names import factor_reason, is_named, ratio_name, scaling_name, value_name
from rtp_llm.tools.verify.order_causes import order_text, paired_rows
from rtp_llm.tools.verify.trace import INPUT, OUTPUT, ROUTING, Place

CONFIG = SimpleNamespace(
    partial_rotary_factor=0.5, logits_scaling=4.0, residual_multiplier=0.3, hidden_size=48, num_attention_heads=3
)


@pytest.mark.parametrize(
    ("factor", "text"),
    [
        (16.0, "ours multiplies by logits_scaling (4), the reference divides by it"),
        (1 / 16, "ours divides by logits_scaling (4), the reference multiplies by it"),
        (4.0, "ours multiplies by logits_scaling (4) and the reference does not"),
        (0.25, "the reference multiplies by logits_scaling (4) and ours does not"),
        (48**-0.5, "the reference multiplies by the root of hidden_size (48) and ours does not"),
        (1.2, "logits_scaling times residual_multiplier of the configuration"),
        (7.77, "another factor, or one where there is none"),
    ],
)
def test_factors_are_told_by_the_configuration(factor: float, text: str) -> None:
    assert factor_reason(factor, CONFIG).startswith(text), factor_reason(factor, CONFIG)


def test_numbers_are_told_by_the_configuration() -> None:
    assert value_name(0.25, CONFIG) == "0.25 (1 / logits_scaling)"
    assert value_name(16.0, CONFIG) == "16 (logits_scaling squared)"
    assert value_name(7.77, CONFIG) == "7.77"
    assert value_name(0.5, CONFIG) == "0.5 (1 / root of logits_scaling)"  # a rotary factor multiplies no tensor


def test_exact_factors_are_preferred_and_lists_are_read() -> None:
    config = SimpleNamespace(ssm_in_multiplier=1.6, attention_in_multiplier=0.7, mlp_multipliers=[0.9, 1.25])
    assert is_named(0.7 / 1.6, config) and not is_named(0.7 / 1.6 * 1.0005, config)
    assert factor_reason(0.7 / 1.6 * 1.0005, config).startswith("attention_in_multiplier through ssm_in_multiplier")
    assert factor_reason(0.8, config).startswith("the reference multiplies by mlp_multipliers[1] (1.25)")


def test_one_number_in_the_place_of_another() -> None:
    config = SimpleNamespace(attention_multiplier=0.35, ssm_multiplier=0.65, ssm_multipliers=[0.7, 1.3, 0.9])
    assert ratio_name(0.7 / 1.3, config) == "ssm_multipliers[0] in the place of ssm_multipliers[1]"
    assert ratio_name(0.35 / 0.9, config) == "attention_multiplier in the place of ssm_multipliers[2]"
    assert ratio_name(7.77, config) == ""


def test_factors_of_scores_are_told_by_sizes_and_by_yarn() -> None:
    yarn = {"factor": 4.0, "mscale_all_dim": 0.707}
    mscale = 1 + 0.1 * 0.707 * math.log(4.0)
    config = SimpleNamespace(hidden_size=64, v_head_dim=12, rope_parameters=yarn)
    assert scaling_name(16**-0.5, 16, config) == "1 / root of 16, the size of a head"
    assert scaling_name(12**-0.5, 16, config) == "1 / root of v_head_dim (12)"
    assert scaling_name(1 / 64, 16, config) == "1 / hidden_size (64)"
    assert scaling_name(16**-0.5 * mscale**2, 16, config).endswith("YaRN's factor of mscale_all_dim (1.09801) squared")
    assert scaling_name(1.0, 16, config) == "1" and scaling_name(0.3, 16, config) == ""


def test_runs_of_rows_are_found_among_equal_rows() -> None:
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    rows[3] = rows[7]  # as separators are
    order = paired_rows(rows[[4, 5, 6, 7, 0, 1, 2, 3]], rows, 1e-4)
    assert order is not None and torch.equal(rows[order], rows[[4, 5, 6, 7, 0, 1, 2, 3]])
    assert paired_rows(rows, rows, 1e-4) is None and paired_rows(rows + 1, rows, 1e-4) is None


def test_a_few_runs_are_told_by_their_ends() -> None:
    order = [*range(3, 10), *range(3)]
    assert order_text(order) == "rows 3 to 9, then 0 to 2 of the reference (its rows 0 to 2 stand last in ours)"


@pytest.mark.parametrize(("block_error", "first"), [(0.0, 3), (0.5, 1)])
def test_what_differs_inside_of_a_block_that_agrees_is_passed_over(block_error: float, first: int) -> None:
    differences = [
        Difference(Place("layers.0.mlp.gate", OUTPUT), 0.0),
        Difference(Place("layers.0.mlp.experts", ROUTING), 0.6),
        Difference(Place("layers.0.mlp", OUTPUT), block_error),
        Difference(Place("layers.0.norm", INPUT), 0.3),
    ]
    assert first_difference(differences, 1e-4) == first
