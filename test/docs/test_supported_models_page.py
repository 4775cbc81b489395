"""The page of supported models is what its script writes, and what it counts is what the tests have."""

import ast
from pathlib import Path

import pytest

import supported_models
from rtp_llm import ModelRegistry


@pytest.fixture(scope="module")
def files() -> dict[str, supported_models.TestFile]:
    return {path.name: supported_models.read_test_file(path) for path in supported_models.TEST_FILES}


def test_the_page_is_up_to_date() -> None:
    hint = "run .venv/bin/python scripts/supported_models.py"
    assert supported_models.PAGE.read_text(encoding="utf-8") == supported_models.page(), hint


def test_every_model_is_tested(files: dict[str, supported_models.TestFile]) -> None:
    """In ``make test``, too; of a model that sees, or makes no tokens, at least in ``make test-all``."""
    models = {model.architecture for model in supported_models.models()}
    assert "LlamaForCausalLM" in models
    assert models < ModelRegistry.get_supported_archs()
    quick = {architecture for file in files.values() for architecture in file.quick}
    slow = {architecture for file in files.values() for architecture in file.slow}
    assert models <= quick | slow
    of_decoders = (quick | slow) - models  # which need no file of their own
    assert all(name.endswith(("ForSequenceClassification", "Model")) for name in of_decoders)
    generating = {model.architecture for model in supported_models.models() if model.generates and not model.sees}
    assert not generating - quick
    assert "Qwen2VLForConditionalGeneration" in quick


def test_no_test_of_a_model_is_missing() -> None:
    """Each has cases, and is tested on two ranks."""
    assert "| none |" not in supported_models.page()


def test_cases_are_counted(files: dict[str, supported_models.TestFile], tmp_path: Path) -> None:
    path = tmp_path / "test_parity_some.py"
    path.write_text(
        "from types import SimpleNamespace as Case\nimport pytest\n"
        "A = Case(name='a', architecture='A', slow=False)\n"
        "CASES = [A, Case(name='b', architecture='A', slow=True), Case(name='c', architecture='B', slow=True),\n"
        " D := Case(name='d', architecture='D', slow=True)]\n"
        "@pytest.mark.parametrize('case', [D])\n"
        "def test_one_prompt(case): pass\n"
        "@pytest.mark.parametrize('case', [A, pytest.param('c', marks=pytest.mark.slow)])\n"
        "def test_two_ranks(case): pass\n"
    )
    some = supported_models.read_test_file(path)
    assert (some.quick, some.slow, some.on_two_ranks) == ({"A": 1, "D": 1}, {"A": 1, "B": 1}, {"A": 1, "B": 1})
    assert not some.with_videos
    assert files["test_tensor_parallel.py"].on_two_ranks["LlamaForCausalLM"] == 1
    assert not files["test_tensor_parallel.py"].quick


def test_cases_of_models_that_see_are_counted(files: dict[str, supported_models.TestFile], tmp_path: Path) -> None:
    """Their cases make checkpoints, and say nothing of architectures."""
    path = tmp_path / "test_mm_some.py"
    path.write_text(
        "from types import SimpleNamespace\nimport tiny_models, tiny_seeing\n"
        "def make_llava(directory):\n    return tiny_models.make_tiny_vision('LlavaForX', directory, {})\n"
        "def case(make, video, slow): return SimpleNamespace(name='', make=make, video=video, slow=slow)\n"
        "CASES = [case(tiny_seeing.make_seeing, '<video>', False), case(make_llava, None, True)]\n"
        "def test_two_ranks(): pass\n"
    )
    some = supported_models.read_test_file(path)
    sees = "Qwen2VLForConditionalGeneration"
    assert (some.quick, some.slow, some.on_two_ranks) == ({sees: 1}, {"LlavaForX": 1}, {sees: 1})
    assert some.with_videos == {sees}
    assert files["test_mm_qwen2_vl.py"].quick.keys() == {sees}


def test_a_model_file_must_say_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "nameless.py"
    path.write_text("EntryClass = Nothing\n")
    with pytest.raises(ValueError, match=r"nameless\.py must begin with a docstring"):
        supported_models.summary_of(path)
    path.write_text('"""Some model (Somebody, 2026)."""\n')
    assert supported_models.summary_of(path) == ast.literal_eval(path.read_text())
