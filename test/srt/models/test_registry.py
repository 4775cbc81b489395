"""The model registry: found by reading, imported on demand."""

import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt.gguf.form import GGUFForm
from rtp_llm.srt.models.model_source import entry_class_names
from rtp_llm.srt.models.registrations import RegistrationError, pack_registrations, unpack_registrations
from rtp_llm.srt.models.registry import (
    PACKAGE_VARIABLE,
    DuplicateModelError,
    ModelImportError,
    ModelRegistry,
    UnknownArchitectureError,
    _ModelRegistry,
    import_model_classes,
)
from warm_python import run_python

ROOT = Path(__file__).resolve().parents[3]


class Mine(nn.Module):
    pass


class Other(nn.Module):
    pass


@pytest.fixture
def make_package(tmp_path, monkeypatch):
    """Writes a package with the given files, and forgets what was imported from it."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def make(package: str, **files: str) -> str:
        directory = tmp_path / package
        directory.mkdir()
        for name, source in {"__init__": "", **files}.items():
            (directory / f"{name}.py").write_text(textwrap.dedent(source))
        return package

    yield make
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def make_registry(make_package) -> Callable[..., _ModelRegistry]:
    """A registry whose built-in models are the given files."""
    return lambda **files: _ModelRegistry(make_package("models_of_test", **files))


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
    registry = make_registry(alpha=ALPHA)
    registry.models["AlphaOld"] = Mine
    registry.models["Other"] = Mine
    assert registry.resolve_model_cls(["AlphaForCausalLM", "AlphaOld"]) == (Mine, "AlphaOld")
    assert registry.resolve_model_cls("Other") == (Mine, "Other")
    assert registry.is_arch_supported("Other") and not registry.is_arch_supported("Another")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LLaMAForCausalLM", "LlamaForCausalLM"),
        ("AquilaForCausalLM", "LlamaForCausalLM"),
        ("AquilaModel", "LlamaForCausalLM"),
        ("InternLMForCausalLM", "LlamaForCausalLM"),
        ("XverseForCausalLM", "LlamaForCausalLM"),
        ("LlamaModel", "LlamaForCausalLM"),
        ("MistralModel", "MistralForCausalLM"),
        ("Qwen2Model", "Qwen2ForCausalLM"),
        ("Qwen3Model", "Qwen3ForCausalLM"),
        ("Gemma2Model", "Gemma2ForCausalLM"),
        ("Gemma3TextModel", "Gemma3ForCausalLM"),
        ("GPT2Model", "GPT2LMHeadModel"),
    ],
)
def test_other_names_of_an_architecture(name, expected):
    model_class, found = ModelRegistry.resolve_model_cls(["Unheard", name])
    assert (model_class.__name__, found) == (expected, expected)


@pytest.mark.parametrize(
    "name", ["LlamaForSequenceClassification", "QWenLMHeadModel", "YiForCausalLM", "llamaforcausallm", "LlavaModel", ""]
)
def test_what_may_compute_otherwise_is_no_other_name(name):
    with pytest.raises(UnknownArchitectureError, match=f"no model for the architecture {name}"):
        ModelRegistry.resolve_model_cls(name)


def test_a_class_of_the_name_itself_wins_over_other_names(make_registry):
    registry = make_registry(
        llama="class LlamaForCausalLM: pass\nclass LlamaModel: pass\nEntryClass = LlamaForCausalLM"
    )
    assert registry.resolve_model_cls("LlamaModel")[1] == "LlamaForCausalLM"
    registry.models["LlamaModel"] = Mine
    assert registry.resolve_model_cls("LlamaModel") == (Mine, "LlamaModel")


def test_an_architecture_in_two_files_names_both_and_harms_no_other(make_registry):
    registry = make_registry(alpha=ALPHA, beta="class AlphaOld: pass\nEntryClass = AlphaOld")
    with pytest.raises(ValueError, match=r"AlphaOld.*\.alpha:AlphaOld, .*\.beta:AlphaOld"):
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


@pytest.mark.parametrize(
    "claim", ["EntryClass = Typo", "EntryClass: list = [\n    Typo,\n    Other]", "EntryClass = (Typo, Other)"]
)
def test_a_file_that_is_not_python_is_told_when_its_architecture_is_asked_for(make_registry, claim):
    registry = make_registry(alpha=ALPHA, typo=f"class Typo(:\n    pass\n{claim}\n")
    assert registry.is_arch_supported("Typo")
    registry.resolve_model_cls("AlphaOld")
    with pytest.raises(ModelImportError, match=r"architecture Typo, models_of_test\.typo, .*SyntaxError") as caught:
        registry.resolve_model_cls(["Unheard", "Typo", "AlphaOld"])
    assert isinstance(caught.value.__cause__, SyntaxError)


# The mapping


def test_models_is_a_mapping_of_all_architectures(make_registry):
    models = make_registry(alpha=ALPHA, beta="class Beta: pass\nEntryClass = Beta").models
    assert set(models) == {"AlphaForCausalLM", "AlphaOld", "Beta"} and len(models) == 3 and "Beta" in models
    assert "models_of_test" not in sys.modules  # names are read, nothing is imported
    assert models["AlphaOld"].__name__ == "AlphaOld" and "models_of_test.beta" not in sys.modules
    assert models.get("Nothing") is None and models.get("Nothing", Mine) is Mine
    with pytest.raises(KeyError):
        models["Nothing"]
    models.update({"Beta": Mine}, New=Other)
    assert dict(models.items()) == {
        "AlphaForCausalLM": models["AlphaForCausalLM"], "AlphaOld": models["AlphaOld"], "Beta": Mine, "New": Other,
    }  # fmt: skip
    assert len(models) == 4 and list(models).count("Beta") == 1
    assert repr(models) == "<models: AlphaForCausalLM, AlphaOld, Beta, New>"


def test_deleting_what_was_set_shows_what_it_hid(make_registry):
    models = make_registry(alpha=ALPHA).models
    built_in = models["AlphaOld"]
    models["AlphaOld"], models["New"] = Mine, Mine
    assert models.pop("AlphaOld") is Mine and models["AlphaOld"] is built_in
    with pytest.raises(KeyError):
        del models["AlphaOld"]
    models["AlphaOld"] = Mine
    models.clear()
    assert models["AlphaOld"] is built_in and "New" not in models


def test_a_broken_file_harms_only_those_who_look_at_its_class(make_registry):
    models = make_registry(alpha=ALPHA, broken="import nothing_of_this_name\nclass B: pass\nEntryClass = B").models
    assert "B" in models and models["AlphaOld"]
    with pytest.raises(ModelImportError):
        models.get("B")


@pytest.mark.parametrize("value", [Mine(), "Mine", None])
def test_what_is_no_class_is_refused(make_registry, value):
    with pytest.raises(TypeError, match=r"ModelRegistry\.models\['X'\] must be a model class, not "):
        make_registry().models["X"] = value


# Packages


@pytest.mark.parametrize(
    ("entry_class", "names"),
    [
        ("One", {"One"}),
        ("[One, Two]", {"One", "Two"}),
        ("(Two,)", {"Two"}),
        ("[c for c in (One, Two)]", {"One", "Two"}),
    ],
)
def test_import_model_classes(make_package, entry_class, names):
    package = make_package(
        "external_models",
        one=f"class One: pass\nclass Two: pass\nEntryClass = {entry_class}",
        helpers="class Helper: pass",
        __main__="raise SystemExit",
    )
    classes = import_model_classes(package)
    assert classes.keys() == names and all(cls.__module__ == "external_models.one" for cls in classes.values())
    assert import_model_classes("external_models.one") == classes  # a module will do


def test_a_package_may_be_one_file(make_package):
    package = make_package("external_models", __init__="class One: pass\nEntryClass = One")
    assert import_model_classes(package, strict=True)["One"].__module__ == "external_models"


@pytest.mark.parametrize("source", ["import nothing_of_this_name", "class (", "1/0", "EntryClass = 'One'"])
def test_a_module_that_cannot_be_imported(make_package, caplog, source):
    package = make_package("external_models", good="class One: pass\nEntryClass = One", bad=source)
    assert import_model_classes(package).keys() == {"One"}
    assert "external_models.bad cannot be imported, and its models are left out: " in caplog.text
    with pytest.raises(ModelImportError, match=r"external_models\.bad cannot be imported: \w+Error: ") as caught:
        import_model_classes(package, strict=True)
    assert caught.value.__cause__ is not None


def test_one_name_in_two_modules(make_package):
    one = "class One: pass\nEntryClass = One"
    package = make_package("external_models", a=one, b="from external_models.a import One\nEntryClass = One")
    assert import_model_classes(package).keys() == {"One"}  # the same class
    package = make_package("external_twins", a=one, b=one)
    for error in (AssertionError, ValueError):
        with pytest.raises(error, match="duplicated model implementation for One"):
            import_model_classes(package)


def test_register(make_registry, make_package):
    registry = make_registry(alpha=ALPHA)
    package = make_package("external_models", one="class AlphaOld: pass\nclass New: pass\nEntryClass = [AlphaOld, New]")
    with pytest.raises(ValueError, match="AlphaOld already registered; set overwrite=True to replace it"):
        registry.register(package)
    assert not registry.is_arch_supported("New")
    registry.register(package, overwrite=True)
    for arch in ("AlphaOld", "New"):
        assert registry.resolve_model_cls(arch)[0].__module__ == "external_models.one" and registry.is_external(arch)
    assert not registry.is_external("AlphaForCausalLM")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        registry.register("no_such_package")


def test_register_keeps_the_error_of_a_broken_module(make_registry, make_package):
    registry = make_registry(alpha=ALPHA)
    broken = "import nothing_of_this_name\nclass B: pass\nEntryClass = B"
    package = make_package("external_models", broken=broken, good="class New: pass\nEntryClass = New")
    with pytest.raises(ModelImportError):
        registry.register(package, strict=True)
    assert "New" not in registry.models
    registry.register(package)
    assert registry.models["New"]
    with pytest.raises(ModelImportError, match=r"architecture B, .*nothing_of_this_name"):
        registry.resolve_model_cls("B")


# The environment


def test_packages_that_the_environment_names_win_over_built_in_files(make_registry, make_package, monkeypatch):
    registry = make_registry(alpha=ALPHA)
    make_package("external_models", one="class AlphaOld: pass\nEntryClass = [c for c in [AlphaOld]]")
    make_package("external_more", two="class New: pass\nEntryClass = New")
    monkeypatch.setenv(PACKAGE_VARIABLE, "external_models, external_more.two,")
    assert registry.get_supported_archs() == {"AlphaForCausalLM", "AlphaOld", "New"}
    model_class, arch = registry.resolve_model_cls(["AlphaForCausalLM", "AlphaOld"])
    assert (model_class.__module__, arch) == ("external_models.one", "AlphaOld")
    registry.models["AlphaOld"] = Mine
    assert registry.models["AlphaOld"] is Mine
    del registry.models["AlphaOld"]
    assert registry.models["AlphaOld"] is model_class


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "external_models: ModuleNotFoundError: No module named 'external_models'"),
        ("import nothing_of_this_name", r"external_models: external_models\.one cannot be imported: ModuleNot"),
        ("class One: pass", "external_models, but no module of it defines EntryClass"),
    ],
)
def test_a_wrong_package_in_the_environment_is_told_whatever_is_asked_for(
    make_registry, make_package, monkeypatch, source, message
):
    registry = make_registry(alpha=ALPHA)
    if source is not None:
        make_package("external_models", one=source)
    monkeypatch.setenv(PACKAGE_VARIABLE, "external_models")
    with pytest.raises(ModelImportError, match=f"^RTP_LLM_EXTERNAL_MODEL_PACKAGE names {message}"):
        registry.resolve_model_cls("AlphaOld")


# Installed packages


@pytest.fixture
def install(tmp_path):
    """What pip leaves of a package with entry points, beside the files of ``make_package``."""

    def make(name: str, *lines: str) -> None:
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("\n".join(["[rtp_llm.models]", *lines]) + "\n")

    return make


def test_entry_points(make_registry, make_package, install):
    registry = make_registry(alpha=ALPHA)
    make_package("external_models", one="class AlphaOld: pass\nclass Two: pass\nEntryClass = [AlphaOld]")
    make_package("external_more", good="class New: pass\nEntryClass = New", bad="class (:\nEntryClass = Bad")
    install("external", "AlphaOld = external_models.one:AlphaOld", "Second = external_models.one:Two")
    install("more", "more = external_more", "Gone = gone.away:Gone", "rest = gone.away")
    assert registry.get_supported_archs() == {"AlphaForCausalLM", "AlphaOld", "Second", "New", "Bad", "Gone"}
    assert not {"external_models", "external_more"} & set(sys.modules)
    model_class, arch = registry.resolve_model_cls(["AlphaForCausalLM", "Second"])
    assert (model_class.__name__, arch) == ("Two", "Second")
    assert registry.models["AlphaOld"].__module__ == "external_models.one" and registry.is_external("AlphaOld")
    assert registry.models["New"].__module__ == "external_more.good"
    for arch, reason in (("Bad", "SyntaxError"), ("Gone", "ModuleNotFoundError")):
        with pytest.raises(ModelImportError, match=f"architecture {arch}, .*{reason}"):
            registry.resolve_model_cls(arch)
    with pytest.raises(UnknownArchitectureError, match=r"entry point rest = gone\.away cannot be read: No module"):
        registry.resolve_model_cls("Unheard")


def test_two_installed_packages_with_one_architecture(make_registry, make_package, install):
    registry = make_registry(alpha=ALPHA)
    make_package("external_models", one="class New: pass\nEntryClass = New")
    install("external", "New = external_models.one:New")
    install("again", "models = external_models")
    assert registry.models["New"]  # the same class, named twice
    make_package("external_more", two="class New: pass\nEntryClass = New")
    install("more", "New = external_more.two:New")
    with pytest.raises(DuplicateModelError, match=r"New is claimed .*external_m.*, external_m.*; keep one"):
        _ModelRegistry("models_of_test").resolve_model_cls("New")


def test_the_command_line_lists_what_is_external(make_package, install, tmp_path, monkeypatch):
    make_package("external_models", one="class FromVariable: pass\nEntryClass = FromVariable")
    make_package("external_more", two="class FromPackage: pass\nEntryClass = FromPackage")
    install("more", "FromPackage = external_more.two:FromPackage")
    monkeypatch.setenv(PACKAGE_VARIABLE, "external_models")
    done = run_python(["-m", "rtp_llm", "models"], path=[tmp_path])
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["FromVariable"] == f"{tmp_path}/external_models/one.py (registered)"
    assert lines["FromPackage"] == f"{tmp_path}/external_more/two.py (registered)"
    assert lines["LlamaForCausalLM"].endswith("models_py/llama.py")


# To other processes


@pytest.fixture
def nothing_set():
    """The global registry without what other tests have set."""
    overrides = ModelRegistry.models.overrides
    before = dict(overrides)
    overrides.clear()
    yield
    overrides.clear()
    overrides.update(before)


def test_what_was_set_arrives_in_another_process(nothing_set, make_package, monkeypatch):
    package = make_package("external_models", one="class New: pass\nEntryClass = New", bad="1 +\nEntryClass = Bad")
    assert pack_registrations() == b""
    ModelRegistry.register(package)
    new = ModelRegistry.models["New"]
    ModelRegistry.models["Mine"] = type("Mine", (LlamaForCausalLM,), {"__module__": "__main__"})  # of a script
    packed = pack_registrations()
    ModelRegistry.models.clear()
    assert not ModelRegistry.is_arch_supported("New")
    unpack_registrations(packed)
    assert ModelRegistry.models["New"] is new and issubclass(ModelRegistry.models["Mine"], LlamaForCausalLM)
    with pytest.raises(ModelImportError, match="SyntaxError"):
        ModelRegistry.models["Bad"]
    for name in [name for name in sys.modules if name.startswith("external_models")]:
        del sys.modules[name]
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    with pytest.raises(RegistrationError, match="registered as 'New' cannot be imported in an engine process"):
        unpack_registrations(packed)


def test_a_class_that_cannot_be_sent(nothing_set):
    lock = threading.Lock()
    ModelRegistry.models["Mine"] = type("Mine", (nn.Module,), {"__module__": "__main__", "lock": lock})
    with pytest.raises(RegistrationError, match=r"registered as 'Mine', cannot be sent .*lock"):
        pack_registrations()


GGUF = """
    from rtp_llm.srt.gguf.form import GGUFForm
    class Alpha:
        gguf = GGUFForm("alpha"), GGUFForm(
            architecture="alpha2",
        )
    class AlphaHeir(Alpha): pass
    class AlphaCopy(Alpha):
        gguf = GGUFForm("alpha")
    EntryClass = [Alpha, AlphaHeir, AlphaCopy]
"""


def gguf_names(registry, architecture):
    return [name for layer in registry.gguf_classes(architecture) for name in layer]


def test_classes_that_read_a_gguf_architecture(make_registry):
    registry = make_registry(alpha=GGUF, broken="import nothing_of_this_name\nclass B: pass\nEntryClass = B")
    assert gguf_names(registry, "alpha") == ["Alpha", "AlphaCopy"]
    assert gguf_names(registry, "alpha2") == ["Alpha"]
    assert gguf_names(registry, "beta") == []
    assert registry.gguf_architectures() == {"alpha", "alpha2"}


def test_a_class_that_was_set_reads_a_gguf_architecture(make_registry):
    class Mine(nn.Module):
        gguf = GGUFForm("mine")

    registry = make_registry(alpha=GGUF)
    registry.models["Mine"] = Mine
    registry.models["Hers"] = type("Hers", (Mine,), {})
    assert registry.gguf_classes("mine")[0] == {"Mine": Mine}
    assert "mine" in registry.gguf_architectures()


def test_an_installed_class_reads_a_gguf_architecture(make_registry, make_package, install, caplog):
    make_package("installed", alpha=GGUF, broken="import nothing_of_this_name\nclass B: pass\nEntryClass = B")
    install("some", "Alpha = installed.alpha:Alpha", "others = installed.broken")
    registry = make_registry(beta=ALPHA)
    assert gguf_names(registry, "alpha2") == ["Alpha"]
    assert "B is left out in the search for a reader of GGUF files" in caplog.text


def test_the_projects_own_models_can_all_be_imported():
    assert {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"} <= (
        ModelRegistry.get_supported_archs()
    )
    for arch in ModelRegistry.get_supported_archs():
        model_class, _ = ModelRegistry.resolve_model_cls(arch)
        assert issubclass(model_class, nn.Module) and model_class.__name__ == arch
