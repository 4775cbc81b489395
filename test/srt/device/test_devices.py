"""Devices behind one port: nobody else asks which one it is, and one that is a folder of its own serves."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rtp_llm import Engine
from rtp_llm.srt.attention.backends import make_backend
from rtp_llm.srt.attention.torch import TorchAttention
from rtp_llm.srt.configs.options import ServerArgsError
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device import choice
from rtp_llm.srt.device.registry import ATTENTION_BACKENDS, DEVICES, register_attention_backend, register_device
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.devices.cpu.provider import CpuProvider
from rtp_llm.srt.devices.reference.provider import ReferenceProvider
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.kernels import reference
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput
from rtp_llm.srt.models.registrations import pack_registrations, unpack_registrations
from rtp_llm.srt.worker.step_recorder import StepRecorder
from tiny_models import TINY_MODELS, random_prompts, tiny_model

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "rtp_llm"
NAMES = ("cpu", "cuda")
MAY_NAME_DEVICES = {PACKAGE / "srt" / "device" / "registry.py"}  # it says where each of them is found


class DeviceQuestions(ast.NodeVisitor):
    """Finds where a file asks which device it is on, or reaches for one device's folder."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def note(self, node: Any) -> None:
        self.found.append((node.lineno, ast.unparse(node)[:100]))

    def visit_Compare(self, node: ast.Compare) -> None:
        if any(_names_device(part) for side in (node.left, *node.comparators) for part in ast.walk(side)):
            self.note(node)
        self.generic_visit(node)

    def visit_MatchValue(self, node: ast.MatchValue) -> None:
        if _names_device(node.value):
            self.note(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        if any(_names_device(key) for key in node.keys):
            self.note(node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = ast.unparse(node.value)
        asks_tensor = node.attr in ("is_cuda", "is_cpu")
        asks_torch = owner == "torch" and node.attr in ("cuda", "accelerator")
        asks_type = node.attr == "type" and (owner.endswith("device") or "device(" in owner)
        if asks_tensor or asks_torch or asks_type:
            self.note(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if (
            isinstance(node.func, ast.Attribute)
            and node.func.attr == "startswith"
            and any(map(_names_device, node.args))
        ):
            self.note(node)
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        if any(alias.name.startswith(("rtp_llm.srt.devices", "torch.cuda")) for alias in node.names):
            self.note(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        if any(name.startswith(("rtp_llm.srt.devices", "torch.cuda")) for name in names):
            self.note(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value.startswith("rtp_llm.srt.devices"):
            self.note(node)


def _names_device(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value in NAMES


def questions(source: str) -> list[tuple[int, str]]:
    finder = DeviceQuestions()
    finder.visit(ast.parse(source))
    return finder.found


def test_nobody_but_providers_asks_which_device_it_is() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if PACKAGE / "srt" / "devices" not in file.parents]
    assert len(files) > 200
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in files
        if file not in MAY_NAME_DEVICES
        for line, text in questions(file.read_text())
    ]
    assert not found, "what depends on the device belongs to its DeviceProvider:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "if device == 'cpu': pass",
        "x = 0 if 'cuda' != self.device else 1",
        "x = device in ('cpu', 'mps')",
        "SIZES = {'cpu': 1, 'cuda': 2}",
        "match device:\n    case 'cuda': pass",
        "x = tensor.is_cpu",
        "x = tensor.is_cuda",
        "x = tensor.device.type",
        "x = torch.device(name).type",
        "x = torch.cuda.is_available()",
        "x = name.startswith('cuda')",
        "from torch.cuda import Event",
        "import rtp_llm.srt.devices.cpu.linear",
        "from rtp_llm.srt.devices.cpu import linear",
        "from rtp_llm.srt import devices",
        "x = import_module('rtp_llm.srt.devices.cpu.linear')",
    ],
)
def test_the_finder_sees_every_question(source: str) -> None:
    assert questions(source)


def test_placing_a_tensor_is_no_question() -> None:
    assert not questions("x = torch.zeros(3, device='cpu').to('cpu')\ny = x.to(other.device)\nz = error.type")


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = [dict(registry.added) for registry in (DEVICES, ATTENTION_BACKENDS)]
    yield
    for registry, added in zip((DEVICES, ATTENTION_BACKENDS), before, strict=True):
        registry.added.clear()
        registry.added.update(added)


def test_an_unknown_device_names_those_there_are(registries) -> None:
    with pytest.raises(ValueError, match=r"unknown device 'tpu'; have \['cpu', 'cuda', 'reference'\]"):
        choice.choose_device("tpu")
    with pytest.raises(ServerArgsError, match="device cannot be 'mine'; have cpu, cuda, reference"):
        ServerArgs(device="mine")
    with pytest.raises(ValueError, match=r"'mine' must be found at 'module:attribute', not at 'mine\.Provider'"):
        register_device("mine", "mine.Provider")
    register_device("mine", "mine.provider:Mine")
    assert ServerArgs(device="mine").device == "mine"


def test_each_device_fills_the_port() -> None:
    for name in DEVICES.names():
        provider = choice.provider_named(name)
        assert provider.name == name and provider is choice.provider_named(name)
        assert provider.problem() is None or not torch.cuda.is_available()
        assert issubclass(ATTENTION_BACKENDS.load(provider.attention_backend(torch.float64)), TorchAttention)
        assert provider.step_recorder is None or issubclass(choice.load_target(provider.step_recorder), StepRecorder)


def test_what_was_registered_travels_to_other_processes(registries) -> None:
    register_device("mine", "mine.provider:Mine")
    register_attention_backend("fast", "mine.attention:Fast")
    packed = pack_registrations()
    DEVICES.added.clear()
    ATTENTION_BACKENDS.added.clear()
    unpack_registrations(packed)
    assert DEVICES.target("mine") == "mine.provider:Mine"
    assert ATTENTION_BACKENDS.target("fast") == "mine.attention:Fast"


def answers(name: str, device: str, **options: Any) -> list[Any]:
    """Ids and log-probabilities of requests of several lengths, which leave one after the other, one of them drawn."""
    prompts = random_prompts(TINY_MODELS[name].vocab_size, (3, 20, 9, 1, 30))
    params = [{"temperature": 0, "max_new_tokens": 4 + 3 * i, "ignore_eos": True} for i in range(len(prompts))]
    params[1] |= {"temperature": 1.0, "seed": 5}
    with Engine(
        model_path=tiny_model(name),
        device=device,
        skip_tokenizer_init=True,
        context_length=96,
        max_total_tokens=600,
        inline=True,
        **{"dtype": "float32", **options},
    ) as engine:
        results = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
        check(engine._runner.core.executor.worker.runner)
    return [(result["output_ids"], result["meta_info"]["output_token_logprobs"]) for result in results]


def check(runner: Any) -> None:
    """Overwritten by tests."""


MIRROR = '''
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.devices.cpu.provider import CpuProvider
from rtp_llm.srt.devices.reference.provider import ReferenceProvider


class Mirror(ReferenceProvider):
    """Nothing of its own."""
'''


def test_a_folder_of_its_own_serves(registries, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "mirror_device"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "provider.py").write_text(MIRROR)
    monkeypatch.syspath_prepend(str(tmp_path))
    register_device("mirror", "mirror_device.provider:Mirror")

    def check_kernels(runner: Any) -> None:
        assert type(runner._provider).__name__ == "Mirror"
        assert runner.model.model.norm._norm is reference.rms_norm
        assert isinstance(runner.attn_backend, TorchAttention)

    monkeypatch.setitem(globals(), "check", check_kernels)
    mirrored = answers("llama-default", "mirror")
    monkeypatch.undo()
    assert mirrored == answers("llama-default", "reference")
    sys.modules.pop("mirror_device.provider", None)


class ReplayingAttention(TorchAttention):
    replays = True


class SizedRecorder(StepRecorder):
    """Takes decode steps of two sizes, with every tensor of a step where it lay in the size's first step."""

    sizes = (2, 8)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.first: dict[int, list[torch.Tensor]] = {}
        self.dummies: list[int] = []

    def takes(self, batch: ForwardBatch) -> bool:
        return batch.batch_size in self.sizes and batch.forward_mode.is_decode()

    def run(self, batch: ForwardBatch) -> LogitsProcessorOutput:
        tensors = [batch.input_ids, batch.positions, batch.req_pool_indices, batch.sample_rows, *batch.out_cache_locs]
        first = self.first.setdefault(batch.batch_size, [tensor.clone() for tensor in tensors])
        for there, tensor in zip(first, tensors, strict=True):
            there.copy_(tensor)
        batch.input_ids, batch.positions, batch.req_pool_indices, batch.sample_rows, *batch.out_cache_locs = first
        self.dummies.append(batch.num_dummies)
        return self._forward(batch)


class SizedReference(ReferenceProvider):
    step_recorder = f"{__name__}:SizedRecorder"

    def attention_backend(self, dtype: torch.dtype) -> str:
        return "replaying"


class SizedCpu(CpuProvider):
    step_recorder = f"{__name__}:SizedRecorder"


def padded_and_plain(monkeypatch, name: str, provider: type, device: str, **options: Any) -> list[tuple[Any, Any]]:
    """The answers of five requests, of which steps of 5 to 3 are padded to 8 and those of 1 to 2; beside those of
    ``device``, which pads none."""
    register_device("sized", f"{__name__}:{provider.__name__}")
    dummies: list[int] = []

    def check_padding(runner: Any) -> None:
        dummies.extend(runner.recorder.dummies)
        for layer_id in [layer_id for group in runner.layout.groups for layer_id in group.layer_ids]:
            cache = runner.kv_pool.layer(layer_id)
            keys, page_size = cache.keys, cache.page_size
            assert not keys[:page_size].any(), "page 0, which shorter page tables are filled with, must stay as it is"
            assert keys[-page_size:].any(), "dummies write to the last page"

    with monkeypatch.context() as patch:
        patch.setitem(globals(), "check", check_padding)
        padded = answers(name, "sized", **options)
    assert set(dummies) == {3, 4, 5, 0, 1}
    return list(zip(padded, answers(name, device, disable_cpu_graph=True, **options), strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama-default", {}), ("mistral-window16-yarn", {"page_size": 4}), ("qwen2-mixed-window16", {})],
)
def test_padded_steps_answer_as_others_do(registries, monkeypatch, name: str, options: dict[str, Any]) -> None:
    """But for last digits: torch's products round otherwise where there are more rows."""
    register_attention_backend("replaying", f"{__name__}:ReplayingAttention")
    for padded, plain in padded_and_plain(monkeypatch, name, SizedReference, "reference", **options):
        assert padded[0] == plain[0]
        ours, theirs = (torch.tensor([entry[0] for entry in entries]) for entries in (padded[1], plain[1]))
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.skipif(not kernels_work(), reason="there is no C++ compiler")
def test_padded_steps_answer_to_the_last_bit_where_rows_are_on_their_own(registries, monkeypatch) -> None:
    """What the kernels compute of a row does not depend on how many there are."""
    for padded, plain in padded_and_plain(monkeypatch, "qwen3-default", SizedCpu, "cpu", dtype="bfloat16"):
        assert padded == plain


def test_a_back_end_says_what_it_cannot_serve() -> None:
    assert type(make_backend(None, "reference", torch.bfloat16)) is TorchAttention
    with pytest.raises(ValueError, match="not float64 on cpu"):
        make_backend("cpu", "reference", torch.float64)
