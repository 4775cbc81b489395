"""Writes docs/supported_models/supported_models.md: the registry's architectures, and the tests that each passes.

    python scripts/supported_models.py           # writes the page
    python scripts/supported_models.py --check   # exits with 1 if the page is not what would be written

What is said of a model is the first sentence of its file. Its tests are those that pytest runs: the test files are
imported, and asked for their cases and for the parameters of their ``test_two_ranks...`` functions.
"""

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "test" / "srt"
sys.path[:0] = [str(ROOT), str(TESTS)]

from rtp_llm.srt.models.loader import FALLBACK
from rtp_llm.srt.models.registry import ModelFile, ModelRegistry
from tiny_models import TINY_MODELS

PAGE = ROOT / "docs" / "supported_models" / "supported_models.md"
TEST_FILES = [
    TESTS / "models" / "test_engine_parity.py",
    TESTS / "models" / "test_tensor_parallel.py",
    *sorted((TESTS / "models").glob("test_parity_*.py")),
]

TEXT = """\
# Supported models

Written by `scripts/supported_models.py` from the registry and the tests. Do not edit.

Language models of these architectures, as `config.json` names them under `architectures`, have a file of their own:

| architecture | file | what it is | cases | on two ranks |
|---|---|---|---|---|
{rows}

**Cases** are tiny random checkpoints, each of another configuration, whose answers must be those of transformers in
float32: equal greedy ids, and log-probabilities within 1e-3; one by one, batched, in chunks, from a warm cache, and
for a second turn. `make test` runs those before the plus sign, `make test-all` the others too. **On two ranks** counts
the cases that tensor parallelism is tested with, over gloo; some run in `make test-all` only. Beside these,
[test_generation_models.py](../../test/srt/models/test_generation_models.py) compares log-probabilities and text of a
twin of every architecture above, from short prompts to long ones; `make test-all` runs all of them.

## Other architectures

Any other causal language model of transformers runs by transformers' own code, on our cache and in our batches, on one
rank, if it keeps nothing but keys and values between tokens. The engine checks this after loading, on a few tokens, and
says what is missing if it refuses. `--model-impl transformers` asks for that code where there is a file here as well.
[test_fallback.py](../../test/srt/models/test_fallback.py) goes through all causal language models of transformers in
`make test-all`, and prints what becomes of each. See [how to support a new model](support_new_models.md).

Images, sound and video are not supported yet, nor are embedding and reward models.
"""


@dataclass(frozen=True)
class Model:
    architecture: str
    file: Path
    summary: str


@dataclass
class TestFile:
    """How many cases of each architecture a test file has."""

    path: Path
    quick: Counter[str]
    slow: Counter[str]
    on_two_ranks: Counter[str]


def models() -> list[Model]:
    """The project's own, by file. The fallback is no architecture, and external models are not listed."""
    found = []
    for architecture, entry in ModelRegistry.models.layers[-1].items():
        if architecture == FALLBACK:
            continue
        if not isinstance(entry, ModelFile) or len(entry.places) != 1:
            raise ValueError(f"{architecture} must come from one file of models_py, not from {entry}")
        file = ROOT / f"{entry.places[0].partition(':')[0].replace('.', '/')}.py"
        found.append(Model(architecture, file, summary_of(file)))
    return sorted(found, key=lambda model: (model.file, model.architecture))


def summary_of(file: Path) -> str:
    """The first line of a file's docstring, which must be a sentence."""
    line = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    if not line.endswith("."):
        raise ValueError(f"{file} must begin with a docstring whose first line is a sentence about the model: {line!r}")
    return line


def read_test_file(path: Path) -> TestFile:
    module = _import(path)
    cases = _cases(module)
    by_name = TINY_MODELS | {case.name: case for case in cases}
    slow = [case for case in cases if getattr(case, "slow", False)]
    quick = [case for case in cases if case not in slow]
    on_two_ranks = [by_name[value] if isinstance(value, str) else value for value in _two_rank_parameters(module)]
    return TestFile(path, *(Counter(case.architecture for case in group) for group in (quick, slow, on_two_ranks)))


def _import(path: Path) -> ModuleType:
    name = f"supported_models_{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _cases(module: ModuleType) -> list[Any]:
    """Objects with a name and an architecture that the file's tests ask on one rank."""
    names = getattr(module, "PARITY_MODELS", [])
    return [*getattr(module, "CASES", []), *(TINY_MODELS[name] for name in names)]


def _two_rank_parameters(module: ModuleType) -> Iterator[Any]:
    for name, function in vars(module).items():
        if name.startswith("test_two_ranks"):
            for mark in function.pytestmark:
                if mark.name == "parametrize":
                    yield from (getattr(value, "values", [value])[0] for value in mark.args[1])


def page() -> str:
    files = [read_test_file(path) for path in TEST_FILES]
    return TEXT.format(rows="\n".join(_row(model, files) for model in models()))


def _row(model: Model, files: list[TestFile]) -> str:
    num_parallel = sum(file.on_two_ranks[model.architecture] for file in files)
    cells = [f"`{model.architecture}`", _link(model.file), model.summary, _counts(model, files)]
    return f"| {' | '.join(cells)} | {num_parallel or 'none'} |"


def _counts(model: Model, files: list[TestFile]) -> str:
    counts = [(file.quick[model.architecture], file.slow[model.architecture], file.path) for file in files]
    found = [
        f"{num_quick}{f' + {num_slow}' if num_slow else ''} in {_link(path)}"
        for num_quick, num_slow, path in counts
        if num_quick or num_slow
    ]
    return ", ".join(found) or "none"


def _link(file: Path) -> str:
    return f"[{file.name}]({Path('../..') / file.relative_to(ROOT)})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the page of supported models.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not up to date")
    args = parser.parse_args(argv)
    if not args.check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE.relative_to(ROOT)} is not up to date; run python scripts/supported_models.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
