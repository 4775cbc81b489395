"""Edits of a reference's source that ``rtp-llm verify`` tries."""

import ast
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import pytest
import torch

from rtp_llm.tools.verify.copies import copied
from rtp_llm.tools.verify.source_edits import Edit, edits, edits_text, name_edits, rarer_edits, rounding_of
from rtp_llm.tools.verify.source_mutations import alike_modules


def function(body: str) -> ast.FunctionDef:
    tree = ast.parse("def f(self, x, y):\n" + "\n".join(f"    {line}" for line in body.split("\n"))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


def all_edits(body: str) -> list[str]:
    tree = function(body)
    whole = ast.unparse(tree)
    found = [
        ast.unparse(ast.fix_missing_locations(edit.tree)).partition("\n")[2]
        for edit in chain(edits(tree), rarer_edits(tree))
    ]
    assert ast.unparse(tree) == whole  # each edit is taken back
    assert all(text != whole.partition("\n")[2] for text in found)
    return found


@pytest.mark.parametrize(
    ("body", "edited"),
    [
        ("return (x + 1) * y", "return x * y"),
        ("return (x + 1) * y", "return x + 1"),
        ("return x - y", "return x + y"),
        ("return torch.sigmoid(x)", "return x"),
        ("return torch.sigmoid(x)", "return torch.softmax(x, dim=-1)"),
        ("return torch.softmax(x, dim=-1)", "return torch.sigmoid(x)"),
        ("return x.clamp(max=3)", "return x"),
        ("return x[..., ::2]", "return x[..., 1::2]"),
        ("x, y = y.chunk(2)\nreturn x", "y, x = y.chunk(2)\n    return x"),
        ("x = self.norm(x)\nreturn x", "return x"),
        ("if y:\n    x = 2 * x\nreturn x", "return x"),
        ("x = norm(x)\nx = turn(x)\nreturn x", "x = turn(x)\n    x = norm(x)\n    return x"),
        ("x = x * y\nz = f(x)\nreturn z", "z = f(x)\n    z = z * y\n    return z"),
        ("return F.avg_pool2d(x, y)", "return F.max_pool2d(x, y)"),
        ("return x.mean(1)", "return x.amax(1)"),
        ("return F.interpolate(x, mode='bilinear')", "return F.interpolate(x, mode='nearest')"),
        ("return f(x, align_corners=True)", "return f(x, align_corners=False)"),
        ("return sum(i * z for i, z in enumerate(x))", "return sum((i * z for i, z in enumerate(reversed([*x]))))"),
        ("for z in x:\n    y = y * z\nreturn y", "for z in reversed([*x]):\n        y = y * z\n    return y"),
        ("return f(x, scale=2)", "return f(x)"),
        ("return f(x, y)", "return f(y, x)"),
        ("return -x", "return x"),
        ("return x.clamp(min=None, max=y)", "return x.clamp(min=-y, max=y)"),
        ("return x.clamp(max=y)", "return x.clamp(min=-y)"),
        ("return x.clamp(-y, y)", "return x.clamp(max=y)"),
        ("return x.cumsum(0)", "return x.cumsum(0) - x"),
        ("return x.repeat_interleave(y, dim=1)", "return torch.cat([x] * y, dim=1)"),
        ("return torch.clamp(x, max=y)", "return torch.clamp(x, min=-y, max=y)"),
        ("return x.pow(2).mean(-1)", "return x.bfloat16().pow(2).mean(-1).float()"),
        ("return x.pow(2).mean(-1)", "return x.pow(2).mean(-1).half().float()"),
        ("return F.softmax(x, dtype=torch.float, dim=-1)", "return F.softmax(x.bfloat16(), dim=-1).float()"),
        ("x = running(y, 1)\nreturn x", "x = running(y, 1)\n    x = x - y\n    return x"),
        ("x, y = y.cos(), y.sin()\nreturn x", "x, y = (y.cos(), y.sin())\n    y = -y\n    return x"),
        (
            "x, y = x.unflatten(-1, (-1, 2)).unbind(-1)\nreturn torch.stack((x, -y), dim=-1).flatten(-2)",
            "x, y = x.unflatten(-1, (2, -1)).transpose(-1, -2).unbind(-1)\n    return torch.cat((x, -y), dim=-1)",
        ),
        ("return x[..., ::2] + x[..., 1::2]", "return x.chunk(2, dim=-1)[0] + x.chunk(2, dim=-1)[1]"),
        (
            "x, y = x.chunk(2, dim=-1)\nreturn torch.cat((-y, x), dim=-1)",
            "x, y = x.unflatten(-1, (-1, 2)).unbind(-1)\n    return torch.stack((-y, x), dim=-1).flatten(-2)",
        ),
        ("x = F.softplus(x)\nreturn x * (1 + F.softplus(y))", "x = x\n    return x * (1 + y)"),
    ],
)
def test_mistakes_are_among_the_edits(body: str, edited: str) -> None:
    assert any(text.strip() == edited.strip() for text in all_edits(body)), all_edits(body)


def test_edits_are_told_by_what_differs() -> None:
    tree = function("pass")
    assert edits_text([Edit(tree, "a = b + 1", "a = b")]) == "`a = b` stood in place of `a = b + 1`"
    assert edits_text([Edit(tree, "a = b", "")]) == "`a = b` were left out"
    two = [Edit(tree, "a = b + c", "a = b"), Edit(tree, "a = b + c", "a = c")]
    assert edits_text(two) == "`a = b` or `a = c` stood in place of `a = b + c`"


def test_edits_that_round_are_known() -> None:
    rounds, adds = (Edit(function("pass"), "a = b.mean()", after) for after in ("a = b.half().mean().float()", "a = b"))
    assert rounding_of([rounds]) == "float16" and rounding_of([rounds, adds]) == ""


def test_of_long_statements_only_what_differs_is_shown() -> None:
    words = " + ".join(f"number_{i}" for i in range(30))
    text = edits_text([Edit(function("pass"), words, words.replace("number_15", "other"))])
    assert (
        text == "`... number_14 + other + number_16 ...` stood in place of `... number_14 + number_15 + number_16 ...`"
    )


def test_another_variable_is_read() -> None:
    tree = function("z = x.scatter(y)\nw = z.fill(y)\nreturn w")
    found = [(edit.before, edit.after) for edit in name_edits(tree)]
    assert ("w = z.fill(y)", "w = x.fill(y)") in found and ("return w", "return z") in found
    assert all("self" not in after for _, after in found)


def test_modules_of_one_class_in_a_list_are_edited_together() -> None:
    modules = {f"layers.0.{name}": torch.nn.ReLU() for name in ("act", "experts.0", "experts.1", "experts.2")}
    modules |= {"layers.0.norms.0": torch.nn.Tanh(), "layers.0.norms.1": torch.nn.Tanh()}
    found = [(name.removeprefix("layers.0."), len(alike)) for name, alike in alike_modules(modules, "layers.0")]
    assert found == [("act", 1), ("experts.0", 3), ("norms.0", 2), ("norms.0", 1), ("norms.1", 1)]


def test_copies_of_arguments_do_not_change() -> None:
    @dataclass(frozen=True)
    class Streams:
        depths: list[torch.Tensor]

    class Pair(NamedTuple):
        one: torch.Tensor
        other: set[int]

    x, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    given = ([x], {"pairs": (Pair(x, {1}), None)}, Streams([x]), parameter, range(3))
    kept = copied(given)
    x += 1
    given[0].append(x)
    given[1]["pairs"][0].other.add(2)
    given[2].depths.append(x)
    assert [tensor.tolist() for tensor in kept[0]] == [[1, 1]]
    [pair, nothing] = kept[1]["pairs"]
    assert pair.one.tolist() == [1, 1] and pair.other == {1} and nothing is None
    assert [tensor.tolist() for tensor in kept[2].depths] == [[1, 1]]
    assert kept[3] is parameter and kept[4] is given[4]
