"""The model registry: found by reading, imported on demand."""

import sys
import textwrap

import pytest
from torch import nn

from rtp_llm.srt.models.registry import (
    ModelImportError,
    ModelRegistry,
    UnknownArchitectureError,
    _ModelRegistry,
    entry_class_names,
)


@pytest.fixture
def make_registry(tmp_path, monkeypatch, request):
    """A registry over a package with the given files."""
    package = f"models_of_{abs(hash(request.node.name))}"

    def make(**files: str) -> _ModelRegistry:
        directory = tmp_path / package
        directory.mkdir()
        (directory / "__init__.py").touch()
        for name, source in files.items():
            (directory / f"{name}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        return _ModelRegistry(package)

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


ALPHA = """
    class AlphaForCausalLM: pass
    class AlphaOld(AlphaForCausalLM): pass
    EntryClass = [AlphaForCausalLM, AlphaOld]
"""


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("EntryClass = A", ["A"]),
        ("EntryClass = [A, B]", ["A", "B"]),
        ("EntryClass = (A, B)", ["A", "B"]),
        ("EntryClass: list[type] = [A]", ["A"]),
        ("def f():\n    EntryClass = A", []),
        ("import torch", []),
    ],
)
def test_entry_class_is_read_from_source(source, names):
    assert entry_class_names(source, "x.py") == names


def test_only_the_file_asked_for_is_imported(make_registry):
    registry = make_registry(alpha=ALPHA, broken="import nothing_of_this_name\nclass B: pass\nEntryClass = B")
    assert registry.get_supported_archs() == {"AlphaForCausalLM", "AlphaOld", "B"}
    model_class, arch = registry.resolve_model_cls(["Unheard", "AlphaOld"])
    assert (model_class.__name__, arch) == ("AlphaOld", "AlphaOld")
    assert registry.resolve_model_cls("AlphaForCausalLM")[1] == "AlphaForCausalLM"
    with pytest.raises(ModelImportError, match=r"broken.*ModuleNotFoundError.*nothing_of_this_name") as caught:
        registry.resolve_model_cls("B")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_an_entry_class_that_does_not_exist(make_registry):
    registry = make_registry(alpha="EntryClass = Alpha")
    with pytest.raises(ModelImportError, match="NameError"):
        registry.resolve_model_cls("Alpha")


def test_what_the_user_sets_wins(make_registry):
    class Mine(nn.Module):
        pass

    registry = make_registry(alpha=ALPHA)
    registry.models["AlphaOld"] = Mine
    registry.models["Other"] = Mine
    assert type(registry.models) is dict
    assert registry.resolve_model_cls(["AlphaForCausalLM", "AlphaOld"]) == (Mine, "AlphaOld")
    assert registry.resolve_model_cls("Other") == (Mine, "Other")
    assert registry.is_arch_supported("Other") and not registry.is_arch_supported("Another")


def test_an_architecture_in_two_files_names_both_and_harms_no_other(make_registry):
    registry = make_registry(alpha=ALPHA, beta="class AlphaOld: pass\nEntryClass = AlphaOld")
    with pytest.raises(ValueError, match=r"AlphaOld.*\.alpha, .*\.beta"):
        registry.resolve_model_cls("AlphaOld")
    registry.resolve_model_cls("AlphaForCausalLM")


def test_an_unknown_architecture_lists_what_is_supported_and_where_to_read_on(make_registry):
    registry = make_registry(alpha=ALPHA, typo="class (", computed="EntryClass = make()")
    with pytest.raises(UnknownArchitectureError) as caught:
        registry.resolve_model_cls(["NoSuch", "NorThis"])
    message = str(caught.value)
    assert "NoSuch, NorThis" in message
    assert "\n  AlphaForCausalLM\n  AlphaOld\n" in message
    assert "typo.py cannot be read: " in message and "computed.py cannot be read: line 1: EntryClass must be" in message
    assert message.endswith("docs/supported_models/support_new_models.md")
    assert isinstance(caught.value, ValueError) and caught.value.__cause__


def test_the_projects_own_models_can_all_be_imported():
    assert {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"} <= (
        ModelRegistry.get_supported_archs()
    )
    for arch in ModelRegistry.get_supported_archs():
        model_class, _ = ModelRegistry.resolve_model_cls(arch)
        assert issubclass(model_class, nn.Module) and model_class.__name__ == arch
