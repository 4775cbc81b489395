"""One test for each statement of docs/specification.md about language models, of its number; and that none is missing,
nor one about models that see (test_multimodal_statements.py).

These are quick. The page names the tests that prove a statement with servers, or by comparing with transformers.
"""

import ast
import inspect
import re
import unittest
from functools import lru_cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from rtp_llm import ModelRegistry, ServerArgs
from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt.configs.options import ArgumentParser
from rtp_llm.srt.entrypoints.http_server import launch_server
from rtp_llm.srt.layers.activation import SiluAndMul
from rtp_llm.srt.layers.logits_processor import LogitsProcessor
from rtp_llm.srt.layers.norm import RMSNorm
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.model_traits import ModelTraits
from rtp_llm.srt.models.registrations import pack_registrations, unpack_registrations
from rtp_llm.srt.models.registry import _ModelRegistry
from rtp_llm.srt.worker.model_runner import ModelRunner
from rtp_llm.tools import reference
from rtp_llm.tools.bench_one_batch import command as bench_one_batch
from rtp_llm.tools.bench_one_batch import correctness, options

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "test"
PAGE = ROOT / "docs" / "specification.md"
GUIDE = ROOT / "docs" / "supported_models" / "support_new_models.md"
PORTING = "## By hand\n"
MODEL_FILES = sorted(path for path in (ROOT / "rtp_llm" / "models_py").glob("*.py") if path.name != "__init__.py")
PARTS_OF_MODELS = [ROOT / "rtp_llm" / "srt" / "layers" / name for name in ("image_text.py", "mlp.py")]
PARTS_OF_MODELS += sorted((ROOT / "rtp_llm" / "srt" / "layers" / "towers").glob("[a-z]*.py"))
FILES = {"S": "docs/test_specification.py", "M": "docs/test_multimodal_statements.py"}  # by the statement's letter


class Mine(nn.Module):
    pass


class Other(nn.Module):
    pass


@pytest.fixture
def only_built_in() -> Any:
    """What a test registers is forgotten."""
    with patch.dict(ModelRegistry.models.overrides, clear=True):
        yield


def import_file(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters_of(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def imported_modules(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_s01_one_file_in_the_models_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file alone makes the architecture known."""
    package = tmp_path / "s01_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "new.py").write_text(
        "from rtp_llm.models_py.llama import LlamaForCausalLM\n"
        "class NewForCausalLM(LlamaForCausalLM):\n    pass\n"
        "EntryClass = NewForCausalLM\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model_class, name = _ModelRegistry("s01_models").resolve_model_cls("NewForCausalLM")
    assert name == "NewForCausalLM"
    assert issubclass(model_class, LlamaForCausalLM)


def test_s02_llama_is_a_model_to_begin_with() -> None:
    of_llamas_blocks = [path for path in MODEL_FILES if "rtp_llm.models_py.llama" in imported_modules(path)]
    assert len(of_llamas_blocks) >= 5
    assert "`llama.py`" in GUIDE.read_text()


def test_s03_the_page_tells_how_to_port() -> None:
    assert "(../porting.md)" in GUIDE.read_text()
    section = (ROOT / "docs" / "porting.md").read_text().split(PORTING, 1)[1]
    for name in ("RadixAttention", "LogitsProcessor", "layer_id", "forward_batch", "EntryClass", "Sampler"):
        assert name in section


def test_s04_both_commands_keep_the_same_rules() -> None:
    reference_hf = import_file(ROOT / "scripts" / "playground" / "reference_hf.py")
    for name in ("read_prompts", "encode", "logits_text", "whole_text"):
        assert getattr(reference_hf, name) is getattr(correctness, name) is getattr(reference, name)
    assert reference_hf.MAX_NEW_TOKENS is options.MAX_NEW_TOKENS is reference.MAX_NEW_TOKENS
    dtypes = reference_hf.parse_args(["--model-path", "X"]).dtype, ServerArgs(model_path="X").dtype
    assert dtypes == ("auto", "auto")


def test_s05_reference_hf_takes_the_command_line() -> None:
    reference_hf = import_file(ROOT / "scripts" / "playground" / "reference_hf.py")
    for model_type in ("text", "mllm"):
        args = reference_hf.parse_args(["--model-path", "X", "--model-type", model_type])
        assert (args.model_path, args.model_type) == ("X", model_type)


def test_s06_bench_one_batch_takes_the_command_line() -> None:
    parser = ArgumentParser()
    options.add_cli_args(parser)
    parsed = parser.parse_args(["--correct", "--model", "X"])
    assert options.OneBatchArgs.from_cli_args(parsed).correctness_test
    assert ServerArgs.from_cli_args(parsed).model_path == "X"
    assert import_file(ROOT / "RTP-LLM" / "bench_one_batch.py").main is bench_one_batch.main


def generation_tests(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TESTS / "srt" / "models"))
    return import_module("test_generation_models")


def test_s07_all_other_models_is_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    module = generation_tests(monkeypatch)
    names = [case.model_path for case in module.ALL_OTHER_MODELS]
    assert "Qwen/Qwen2-1.5B" in names
    assert "tiny/LlamaForCausalLM" in names
    assert len(names) == len(set(names))


def test_s08_only_run_chooses_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    module = generation_tests(monkeypatch)
    [test] = unittest.defaultTestLoader.loadTestsFromName("TestGenerationModels.test_others", module)
    ran: list[str] = []
    monkeypatch.setattr(type(test), "run_case", lambda self, case: ran.append(case.model_path))
    monkeypatch.setenv("ONLY_RUN", "Qwen/Qwen2-1.5B")
    assert test.run().wasSuccessful()  # type: ignore[union-attr]
    assert ran == ["Qwen/Qwen2-1.5B"]


def test_s09_pull_requests_report_benchmarks() -> None:
    template = (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()
    for name in ("gsm8k", "mmlu", "mmmu", "mmmu_pro"):
        assert f"`benchmark/{name}`" in template
        assert {"bench_hf.py", "bench_rtp_llm.py"} <= {path.name for path in (ROOT / "benchmark" / name).glob("*.py")}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("activation", "SiluAndMul GeluAndMul get_act_fn"),
        (
            "linear",
            "ReplicatedLinear ColumnParallelLinear MergedColumnParallelLinear QKVParallelLinear RowParallelLinear",
        ),
        ("logits_processor", "LogitsProcessor"),
        ("quantization.base", "QuantizationConfig"),
    ],
)
def test_s10_layers_have_the_names_that_vllm_gives_them(module: str, names: str) -> None:
    layers = import_module(f"rtp_llm.srt.layers.{module}")
    assert not [name for name in names.split() if not hasattr(layers, name)]


def test_s11_there_is_a_llama_to_compare_with() -> None:
    assert ModelRegistry.models["LlamaForCausalLM"] is LlamaForCausalLM
    assert "`llama.py`" in GUIDE.read_text()


def test_s12_radix_attention_is_told_its_layer_id() -> None:
    with pytest.raises(TypeError, match="layer_id"):
        RadixAttention(2, 8, 0.5, num_kv_heads=1)  # type: ignore[call-arg]
    assert RadixAttention(2, 8, 0.5, num_kv_heads=1, layer_id=3).layer_id == 3
    assert parameters_of(RadixAttention.forward)[:4] == ["q", "k", "v", "forward_batch"]


def test_s13_logits_processor_is_called_at_the_end_of_forward() -> None:
    assert parameters_of(LogitsProcessor.forward)[:4] == ["input_ids", "hidden_states", "lm_head", "forward_batch"]
    assert parameters_of(LogitsProcessor)[:1] == ["config"]


def test_s14_rms_norm_and_silu_and_mul() -> None:
    x, residual = torch.randn(2, 3, 10).unbind()
    normed, added = RMSNorm(10, eps=1e-5)(x, residual)
    torch.testing.assert_close(added, x + residual)
    torch.testing.assert_close(normed, nn.functional.rms_norm(added, (10,), torch.ones(10), 1e-5))
    torch.testing.assert_close(SiluAndMul()(x), nn.functional.silu(x[:, :5]) * x[:, 5:])


def test_s15_no_model_samples() -> None:
    for path in (*MODEL_FILES, *PARTS_OF_MODELS):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        assert "sample" not in functions, path.name
        assert not {"Sampler", "SamplerOutput"} & names, path.name


def test_s16_forward_batch_is_called_where_it_is_defined() -> None:
    class WithForward:
        def __call__(self, input_ids, positions, forward_batch):
            return "forward", input_ids, positions, forward_batch

    class WithBoth(WithForward):
        def forward_batch(self, batch):
            return "forward_batch", batch

    batch = SimpleNamespace(input_ids=[5], positions=[0])
    for model, expected in (
        (WithForward(), ("forward", [5], [0], batch)),
        (WithBoth(), ("forward_batch", batch)),
    ):
        assert ModelRunner._entry_point(SimpleNamespace(model=model, traits=ModelTraits.of(model)))(batch) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_s17_entry_class_ends_every_model_file(path: Path) -> None:
    last = ast.parse(path.read_text()).body[-1]
    assert isinstance(last, ast.Assign)
    assert ast.unparse(last.targets[0]) == "EntryClass"


def test_s18_nothing_of_vllm_is_imported() -> None:
    for path in (ROOT / "rtp_llm").rglob("*.py"):
        roots = {module.partition(".")[0] for module in imported_modules(path)}
        assert not roots & {"vllm", "sglang"}, path


def test_s19_supported_models_are_listed() -> None:
    listed = (ROOT / "docs" / "supported_models" / "supported_models.md").read_text()
    built_in = set(ModelRegistry.models.layers[-1]) - {
        "TransformersForCausalLM",
        "TransformersEncoder",
    }  # no architectures
    assert not {name for name in built_in if f"| `{name}` |" not in listed}


def test_s20_what_was_registered_reaches_other_processes(only_built_in: None) -> None:
    ModelRegistry.models["MineForCausalLM"] = Mine
    assert ModelRegistry.is_external("MineForCausalLM")
    packed = pack_registrations()
    ModelRegistry.models.clear()
    assert not ModelRegistry.is_arch_supported("MineForCausalLM")
    unpack_registrations(packed)
    assert ModelRegistry.models["MineForCausalLM"].__name__ == "Mine"


def test_s21_one_model_is_added_by_its_name(only_built_in: None) -> None:
    ModelRegistry.models["MineForCausalLM"] = Mine
    assert ModelRegistry.resolve_model_cls(["MineForCausalLM"]) == (Mine, "MineForCausalLM")
    assert "LlamaForCausalLM" in ModelRegistry.models


def test_s22_several_models_are_added_at_once(only_built_in: None) -> None:
    @lru_cache
    def import_new_model_classes() -> dict[str, type[nn.Module]]:
        return {"MineForCausalLM": Mine, "OtherForCausalLM": Other}

    ModelRegistry.models.update(import_new_model_classes())
    assert ModelRegistry.models["MineForCausalLM"] is Mine
    assert ModelRegistry.models["OtherForCausalLM"] is Other


def test_s23_launch_server_takes_server_args() -> None:
    first, *others = inspect.signature(launch_server).parameters.values()
    assert (first.name, first.annotation) == ("server_args", ServerArgs)
    assert all(parameter.default is not parameter.empty for parameter in others)


def statements() -> dict[str, list[str]]:
    """Number -> the tests that the page names for it, as ``folder/file.py::names``."""
    rows = re.findall(r"^\| ([SM]\d\d) \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    return {
        number: [
            name if "::" in name else f"{FILES[number[0]]}::{name}"
            for name in re.findall(r"`([\w/.]*(?:\.py::)?(?:\w+::)?test_\w+)`", rest.split("|")[2])
        ]
        for number, rest in rows
    }


@pytest.mark.parametrize("letter", FILES)
def test_every_statement_has_a_test_of_its_number(letter: str) -> None:
    source = ast.parse((TESTS / FILES[letter]).read_text())
    names = [node.name for node in source.body if isinstance(node, ast.FunctionDef)]
    numbered = [f"{FILES[letter]}::{name}" for name in names if re.match(rf"test_{letter.lower()}\d\d_", name)]
    of_letter = {number: tests for number, tests in statements().items() if number.startswith(letter)}
    assert len(of_letter) == {"S": 23, "M": 8}[letter]
    named = [test for tests in of_letter.values() for test in tests if test in numbered]
    assert sorted(named) == sorted(numbered)
    prefixes = {number: f"{FILES[letter]}::test_{number.lower()}_" for number in of_letter}
    assert all(tests[0].startswith(prefixes[number]) for number, tests in of_letter.items())


@pytest.mark.parametrize("number", statements())
def test_the_tests_that_the_page_names_exist(number: str) -> None:
    for test in statements()[number]:
        file, *names = test.split("::")
        scope: Any = ast.parse((TESTS / file).read_text())
        for name in names:
            found = [node for node in scope.body if getattr(node, "name", None) == name]
            assert len(found) == 1, test
            scope = found[0]
