"""Writes docs/supported_models/supported_models.md: the registry's architectures, and the tests that each passes.

    python scripts/supported_models.py           # writes the page
    python scripts/supported_models.py --check   # exits with 1 if the page is not what would be written

What is said of a model is the first sentence of its file. Its tests are those that pytest runs: the test files are
imported, and asked for their cases and for the parameters of their ``test_one_prompt`` and ``test_two_ranks...``
functions.
"""

import argparse
import ast
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NoReturn
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "test" / "srt"
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "helpers")]

import encoder_fallback
import recurrent_fallback
import transformers

import tiny_models
from rtp_llm.srt.configs.model_config import is_multimodal_model
from rtp_llm.srt.models.loader import ENCODER_FALLBACK, FALLBACK
from rtp_llm.srt.models.registry import ModelFile, ModelRegistry
from tiny_models import TINY_MODELS

GGUF_TEST = TESTS / "gguf" / "test_architectures.py"
PAGE = ROOT / "docs" / "supported_models" / "supported_models.md"
TEST_FILES = [
    TESTS / "models" / "test_engine_parity.py",
    TESTS / "models" / "test_tensor_parallel.py",
    *sorted((TESTS / "models").glob("test_parity_*.py")),
    *sorted((TESTS / "models").glob("test_mm_*.py")),
    *sorted((TESTS / "models").glob("test_pooled_*.py")),
]

TEXT = """\
# Supported models

Written by `scripts/supported_models.py` from the registry and the tests. Do not edit.

Language models of these architectures, as `config.json` names them under `architectures`, have a file of their own:

| architecture | file | what it is | GGUF | cases | on two ranks |
|---|---|---|---|---|---|
{language_rows}

**Cases** are tiny random checkpoints, each of another configuration, whose answers must be those of transformers in
float32: equal greedy ids, and log-probabilities within 1e-3; one by one, batched, in chunks, from a warm cache, and
for a second turn. `make test` runs those before the plus sign, of some models with one prompt only, and `make test-all`
runs all. **On two ranks** counts the cases that tensor parallelism is tested with, over gloo; some run in
`make test-all` only. Beside these, [test_generation_models.py](../../test/srt/models/test_generation_models.py)
compares log-probabilities and text of a twin of every architecture above, from short prompts to long ones;
`make test-all` runs all of them.

## From GGUF files

**GGUF** above is the `general.architecture` of files that hold the model; their class is found by it, and `config.json`
is made of their metadata. Of each such architecture, [test_architectures.py](../../test/srt/gguf/test_architectures.py)
writes a file from a tiny checkpoint, as llama.cpp's converter does: in float32 our answers to it must be those of
transformers to the checkpoint, and its configuration the checkpoint's own. Some are read by another class, which
computes the same:

{read_as}

No GGUF has these:

{without_gguf}

What `config.json` may say and no key of a GGUF does, and what is taken instead:

{not_said}

Of a model that sees, a GGUF holds the language model alone.

## Models that see

All of these take texts and prompts with one image or several; some take videos, as frames.

| architecture | file | what it is | videos | cases | on two ranks |
|---|---|---|---|---|---|
{seeing_rows}

Their **cases** are asked without an image, with one, with three of different sizes, with one after a long text and,
where videos are taken, with the frames of one, alone and beside an image; one by one, batched, from a warm cache, and
in chunks of 16 tokens, which end within images unless a model must see these whole. Transformers is given the same
pixels, and answers must be its own, as above. Sound is not taken.

## Models with pooled outputs

These make no tokens, but [vectors, probabilities of labels, or scores](../embeddings.md):

| architecture | file | what it is | cases |
|---|---|---|---|
{pooled_rows}

Every decoder above embeds as well (`--convert embed`), and runs as its `...ForSequenceClassification`. **Cases** are
tiny random checkpoints whose outputs must be those of transformers in float32, within 1e-5: each input alone, and
batched with others of unequal lengths.

### Other encoders

Other encoders of transformers run by its own code, on one rank: inputs of equal lengths together, none padded. Of its
classes without text as their output, for sequences, for tokens and bare, these {num_encoders} agree in float32 within
1e-5, in batches and alone ([test_fallback_encoders.py](../../test/srt/models/test_fallback_encoders.py)):

{encoders}

These are refused, since they read something else than a text's ids, or for their size in the test:

{refused_encoders}

Classes that read images or sound are refused likewise; of the rest no tiny checkpoint was tried, or could be made.

## Other architectures

Any other causal language model of transformers runs by transformers' own code, on our cache and in our batches, on one
rank, if it keeps keys and values, and states that it asks transformers' cache for. The engine checks this after
loading, on a few tokens, and says what is missing if it refuses. `--model-impl transformers` asks for that code where
there is a file here as well. [test_fallback.py](../../test/srt/models/test_fallback.py) goes through all causal
language models of transformers in `make test-all`, and prints what becomes of each. See
[how to support a new model](support_new_models.md). A model that takes images and has no file here is refused by name.

### Models that keep a state

Of the causal language models of transformers {version} that keep a recurrent state, or that of a convolution, these
{num_agree} agree with transformers in float32 when they run by its code: tiny random checkpoints, one by one, batched,
in chunks, from a warm cache, in pages, and for a second turn
([test_fallback_states.py](../../test/srt/models/test_fallback_states.py)).

{agree}

Of these, some agree under a condition:

{notes}

These are refused:

{refused}
"""


@dataclass(frozen=True)
class Model:
    architecture: str
    file: Path
    summary: str

    @property
    def generates(self) -> bool:
        return self.architecture in ModelRegistry.get_generating_archs()

    @property
    def sees(self) -> bool:
        return is_multimodal_model(self.architecture)


@dataclass
class TestFile:
    """How many cases of each architecture a test file has, and those whose cases have videos."""

    path: Path
    quick: Counter[str]
    slow: Counter[str]
    on_two_ranks: Counter[str]
    with_videos: set[str]


def models() -> list[Model]:
    """The project's own, by file. The fallback is no architecture, and external models are not listed."""
    found = []
    for architecture, entry in ModelRegistry.models.layers[-1].items():
        if architecture in (FALLBACK, ENCODER_FALLBACK):
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
    once = {case.name for case in _parameters(getattr(module, "test_one_prompt", None))}
    slow = [case for case in cases if getattr(case, "slow", False) and case.name not in once]
    quick = [case for case in cases if case not in slow]
    on_two_ranks = [by_name[value] if isinstance(value, str) else value for value in _two_rank_parameters(module)]
    counts = (Counter(map(architecture_of, group)) for group in (quick, slow, on_two_ranks))
    return TestFile(
        path, *counts, {architecture_of(case) for case in cases if getattr(case, "video", None) is not None}
    )


class _Asked(Exception):
    """The name of the class that a case wanted of transformers."""


class _Asking:
    def __getattr__(self, name: str) -> NoReturn:
        raise _Asked(name)


def architecture_of(case: Any) -> str:
    """What a case names; where it only makes a checkpoint, the first class that it asks transformers for to do so, or
    what the checkpoint says."""
    if hasattr(case, "architecture"):
        return case.architecture
    with TemporaryDirectory() as directory, patch.object(tiny_models, "transformers", _Asking()):
        try:
            return json.loads((Path(case.make(Path(directory))) / "config.json").read_text())["architectures"][0]
        except _Asked as asked:
            return str(asked)


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
    """Cases, or their names. A test without parameters has the file's first case."""
    for name, function in vars(module).items():
        if name.startswith("test_two_ranks"):
            yield from _parameters(function) or _cases(module)[:1]


def _parameters(test: Callable[..., Any] | None) -> list[Any]:
    """What a test is parametrized with; empty without parameters, or without such a test."""
    lists = [mark.args[1] for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    return [getattr(value, "values", [value])[0] for listed in lists for value in listed]


def page() -> str:
    files = [read_test_file(path) for path in TEST_FILES]
    gguf = _import(GGUF_TEST)
    seeing = [model for model in models() if model.sees]
    reading = [model for model in models() if model.generates and not model.sees]
    pooled = [model for model in models() if not model.generates]
    return TEXT.format(
        language_rows="\n".join(_row(model, files, [_gguf_name(model, gguf)]) for model in reading),
        pooled_rows="\n".join(_pooled_row(model, files) for model in pooled),
        seeing_rows="\n".join(_row(model, files, [_takes_videos(model, files)]) for model in seeing),
        read_as=_list({name: f"`{other}`" for name, other in gguf.READ_AS.items()}),
        without_gguf=_list(gguf.WITHOUT_GGUF),
        not_said=_list(gguf.NOT_SAID),
        version=transformers.__version__.rpartition(".")[0],
        num_agree=len(recurrent_fallback.AGREE),
        agree=textwrap.fill(", ".join(f"`{name}`" for name in recurrent_fallback.AGREE), 120),
        notes=_list(recurrent_fallback.NOTES),
        refused=_list(recurrent_fallback.REFUSED),
        num_encoders=len(encoder_fallback.AGREE),
        encoders=textwrap.fill(", ".join(f"`{name}`" for name in encoder_fallback.AGREE), 120),
        refused_encoders=_list(encoder_fallback.REFUSED),
    )


def _list(said: Mapping[str, str]) -> str:
    return "\n".join(f"- `{architecture}`: {what}" for architecture, what in sorted(said.items()))


def _gguf_name(model: Model, gguf: ModuleType) -> str:
    """``general.architecture`` of its files."""
    conversion = gguf.CONVERSIONS.get(model.architecture)
    return f"`{conversion.architecture}`" if conversion else "no"


def _takes_videos(model: Model, files: list[TestFile]) -> str:
    return "yes" if any(model.architecture in file.with_videos for file in files) else "no"


def _row(model: Model, files: list[TestFile], more: list[str]) -> str:
    num_parallel = sum(file.on_two_ranks[model.architecture] for file in files)
    cells = [f"`{model.architecture}`", _link(model.file), model.summary, *more, _counts(model, files)]
    return f"| {' | '.join(cells)} | {num_parallel or 'none'} |"


def _pooled_row(model: Model, files: list[TestFile]) -> str:
    return f"| `{model.architecture}` | {_link(model.file)} | {model.summary} | {_counts(model, files)} |"


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
