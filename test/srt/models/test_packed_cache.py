"""``packed_cache``: models from the cache equal those from checkpoints to the bit; what does not fit is not used."""

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import quantized
import torch
from thread_ranks import thread_worlds
from torch import nn

from gguf_conversions import CONVERSIONS
from gguf_writing import write_gguf
from rtp_llm import Engine
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.distributed.parallel_state import WorldShape, seen_as
from rtp_llm.srt.layers.auto_weights import AutoWeightsLoader
from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.quantization.base import hidden_parameters, tensors_of
from rtp_llm.srt.models import loader, packed_cache
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.registry import ModelRegistry
from rtp_llm.srt.utils.checked_file import FIRST_SECTION
from tiny_models import make_tiny
from warm_python import WarmPython

SIZES: dict[str, Any] = dict(
    hidden_size=256, intermediate_size=320, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
)
EXPERTS: dict[str, Any] = SIZES | dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=64, decoder_sparse_step=1
)
MLA: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, first_k_dense_replace=1,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1, num_attention_heads=4,
    num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
ORDERED = quantized.Format(
    "ordered",
    {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": True},
    quantized.gptq,
    shuffled=True,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a tiny checkpoint, once."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = {"LlamaForCausalLM": SIZES, "Qwen3MoeForCausalLM": EXPERTS, "DeepseekV3ForCausalLM": MLA}

    def make(architecture: str) -> Path:
        path = folder / architecture
        if not path.exists():
            make_tiny(architecture, path, **sizes[architecture])
        return path

    return make


@pytest.fixture
def checkpoint(made: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Llama of one's own, to be changed."""
    return Path(shutil.copytree(made("LlamaForCausalLM"), tmp_path / "llama"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RTP_LLM_PACKED_CACHE", str(tmp_path / "packed"))
    return tmp_path / "packed"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO)
    yield caplog


def load(folder: Path | str, dtype: str = "bfloat16", **options: Any) -> nn.Module:
    config = ModelConfig.from_pretrained(str(folder), dtype=dtype, with_tokenizer=False)
    return load_model(config, config.model_path, **{"packed_cache": True} | options)


def state_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All tensors of a model, packed ones and plain attributes among them."""
    attributes = [
        (f"{name}.{key}", value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    ]
    return [*model.state_dict().items(), *attributes, *(("packed", tensor) for tensor in tensors_of(model))]


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for (name, ours), (other, theirs) in zip(state_of(first), state_of(second), strict=True):
        assert name == other and ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (ours, theirs)))
    for layer, other_layer in zip(first.modules(), second.modules(), strict=True):
        assert type(layer) is type(other_layer)
        if isinstance(layer, LinearBase):
            x = torch.randn(3, layer.input_size, generator=torch.Generator().manual_seed(1)).to(layer.params_dtype)
            ours, theirs = layer.dequantized_weight(), other_layer.dequantized_weight()  # type: ignore[operator]
            assert torch.equal(ours, theirs)
            assert torch.equal(layer.quant_method.apply(layer, x), layer.quant_method.apply(other_layer, x))  # type: ignore
            assert type(layer.packed) is type(other_layer.packed)


def from_cache(monkeypatch: pytest.MonkeyPatch, folder: Path | str, *args: Any, **options: Any) -> nn.Module:
    """Load a model whose weight files cannot be read."""
    with monkeypatch.context() as patched:
        patched.setattr(loader, "_read", None)
        return load(folder, *args, **options)


@pytest.mark.parametrize(
    ("architecture", "dtype", "quantization"),
    [
        ("LlamaForCausalLM", "bfloat16", None),
        ("LlamaForCausalLM", "bfloat16", "int8"),
        ("LlamaForCausalLM", "bfloat16", "int4"),
        ("LlamaForCausalLM", "bfloat16", "fp8"),
        ("LlamaForCausalLM", "float16", None),
        ("LlamaForCausalLM", "float32", None),
        ("LlamaForCausalLM", "float32", "int8"),
        ("LlamaForCausalLM", "float32", "int4"),
        ("Qwen3MoeForCausalLM", "bfloat16", None),
        ("Qwen3MoeForCausalLM", "bfloat16", "int8"),
        ("Qwen3MoeForCausalLM", "bfloat16", "int4"),
        ("Qwen3MoeForCausalLM", "float32", "fp8"),
        ("DeepseekV3ForCausalLM", "bfloat16", None),
        ("DeepseekV3ForCausalLM", "float32", "int8"),
    ],
)
def test_a_hit_equals_a_miss(
    architecture: str, dtype: str, quantization: str | None, made: Callable[[str], Path], cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = made(architecture)
    plain = load(folder, dtype, quantization=quantization, packed_cache=False)
    assert not cache.exists()
    assert_same(plain, load(folder, dtype, quantization=quantization))
    assert_same(plain, from_cache(monkeypatch, folder, dtype, quantization=quantization))
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("LlamaForCausalLM", "Q4_0"),
        ("Qwen3MoeForCausalLM", "Q8_0"),
        ("LlamaForCausalLM", "Q8_0"),
        ("LlamaForCausalLM", "F16"),
        ("Qwen3MoeForCausalLM", "Q4_0"),
        ("Qwen3MoeForCausalLM", "F16"),
    ],
)
def test_a_gguf(
    architecture: str, kind: str, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{kind}.gguf"
    write_gguf(made(architecture), path, CONVERSIONS[architecture], gguf.GGMLQuantizationType[kind])
    plain = load(path, packed_cache=False)
    assert_same(plain, load(path))
    assert_same(plain, from_cache(monkeypatch, path))


def test_weights_in_another_order(made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of inputs that are not neighbours: packed weights within packed weights."""
    _, folder = quantized.quantize(
        str(made("LlamaForCausalLM")), tmp_path, ORDERED, lambda name: re.search(r"_proj\.weight$", name) is not None
    )
    plain = load(folder, packed_cache=False)
    assert_same(plain, load(folder))
    assert_same(plain, from_cache(monkeypatch, folder))


def test_each_rank_has_its_file(made: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, worlds = made("LlamaForCausalLM"), thread_worlds(WorldShape(tensor=2))
    loaded: list[nn.Module] = []
    for world in worlds:
        with seen_as(world):
            loaded.append(load(folder, quantization="int8"))
    assert len(list(cache.iterdir())) == 2
    for world, model in zip(worlds, loaded, strict=True):
        with seen_as(world):
            again = from_cache(monkeypatch, folder, quantization="int8")
            for ours, theirs in zip(tensors_of(model), tensors_of(again), strict=True):
                assert torch.equal(ours, theirs)


def test_answers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(**options: Any) -> list[int]:
        with Engine(
            model_path=str(checkpoint), dtype="bfloat16", quantization="int8", inline=True, **options
        ) as engine:
            sampling = {"max_new_tokens": 12, "temperature": 0}
            ids: list[int] = engine.generate(input_ids=[5, 9, 2], sampling_params=sampling)["output_ids"]
            return ids

    plain = answer()
    assert answer(packed_cache=True) == plain
    monkeypatch.setattr(loader, "_read", None)
    assert answer(packed_cache=True) == plain


def test_the_log(checkpoint: Path, log: pytest.LogCaptureFixture) -> None:
    done: list[tuple[int, int]] = []
    for _ in range(2):
        load(checkpoint, progress=lambda *progress: done.append(progress))
    for verb in ("kept", "read"):
        assert re.search(rf"{verb} packed weights of \d+\.\d\d GB in \d+\.\d s: \S+/llama-\w+-\w+\.packed", log.text)
    assert done[-2][0] == 0 and done[-1][0] == done[-1][1] == done[-2][1]


# What is not used


def path_of(cache: Path) -> Path:
    (path,) = cache.glob("*.packed")
    return path


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda data: data[: FIRST_SECTION + 100] + b"\xff" + data[FIRST_SECTION + 101 :],
            "are not those that were written",
        ),
        (lambda data: data[: len(data) // 2], r"it has \d+ bytes, not \d+"),
        (lambda data: data[:-9] + b"?" + data[-8:], "its description is not the one that was written"),
        (lambda data: b"", "does not begin as such a file does"),
        (lambda data: b"GGUF" + data[4:], "does not begin as such a file does"),
    ],
    ids=["a byte", "half", "description", "empty", "foreign"],
)
def test_a_damaged_file_is_told_and_written_anew(
    spoil: Callable[[bytes], bytes], reason: str, checkpoint: Path, cache: Path, log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain = load(checkpoint, quantization="int8")
    path = path_of(cache)
    whole = path.read_bytes()
    spoiled = spoil(whole)
    assert spoiled != whole
    path.write_bytes(spoiled)
    assert_same(plain, load(checkpoint, quantization="int8"))
    assert re.search(rf"packed weights are not used, but made and kept anew: {path}: .*{reason}", log.text)
    assert path.read_bytes() == whole
    assert_same(plain, from_cache(monkeypatch, checkpoint, quantization="int8"))


def test_a_file_of_another_model_is_not_used(
    checkpoint: Path, made: Callable[[str], Path], cache: Path, log: pytest.LogCaptureFixture
) -> None:
    other = load(made("Qwen3MoeForCausalLM"))
    foreign = path_of(cache).rename(cache / "foreign")
    plain = load(checkpoint)
    path = path_of(cache)
    foreign.replace(path)
    assert_same(plain, load(checkpoint))
    assert f"{path}: it is another model's" in log.text
    assert type(other) is not type(plain)


def test_a_class_that_is_not_there(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, log: Any) -> None:
    plain = load(checkpoint)
    with monkeypatch.context() as patched:
        patched.setattr("rtp_llm.srt.kernels.packed_image._subclasses", lambda cls: iter(()))
        assert_same(plain, load(checkpoint))
    assert "there is no packed weight of rtp_llm.srt.devices.cpu.linear:BFloat16Panels" in log.text


def change_within(path: Path) -> None:
    """Change a weight file's last byte; size and time of change stay."""
    info = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    time.sleep(0.02)  # the system's clock of files may be coarse
    path.write_bytes(data)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert path.stat().st_mtime_ns == info.st_mtime_ns


def test_a_changed_checkpoint_replaces_the_old_one(checkpoint: Path, cache: Path, log: Any) -> None:
    before = load(checkpoint)
    old = path_of(cache)
    change_within(checkpoint / "model.safetensors")
    after = load(checkpoint)
    assert_same(after, load(checkpoint, packed_cache=False))
    assert any(
        not torch.equal(ours, theirs) for ours, theirs in zip(tensors_of(before), tensors_of(after), strict=True)
    )
    assert path_of(cache) != old
    assert f"removed packed weights, replaced: {old}" in log.text


def test_a_changed_configuration_replaces_the_old_one(checkpoint: Path, cache: Path) -> None:
    load(checkpoint)
    old = path_of(cache)
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    load(checkpoint)
    assert path_of(cache) != old


def test_another_program_replaces_the_old_one(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(checkpoint)
    old = path_of(cache)
    monkeypatch.setattr(packed_cache, "__version__", "0.0.0.test")
    load(checkpoint)
    assert path_of(cache) != old


def test_quantizations_and_dtypes_have_files_of_their_own(checkpoint: Path, cache: Path, log: Any) -> None:
    kinds = [("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4"), ("float16", None)]
    for dtype, quantization in kinds * 2:
        load(checkpoint, dtype, quantization=quantization)
    assert len(list(cache.iterdir())) == log.text.count("kept packed weights of") == len(kinds)
    assert log.text.count("read packed weights of") == len(kinds)


def test_unused_files_and_remains_are_removed(checkpoint: Path, cache: Path, log: Any) -> None:
    cache.mkdir(mode=0o700)
    long_ago = time.time() - (packed_cache.KEPT_DAYS + 1) * 86400
    for name in ("old-000000000000-0.packed", "recent-000000000000-0.packed", "remains.new", "notes.txt"):
        (cache / name).touch()
    os.utime(cache / "old-000000000000-0.packed", (long_ago, long_ago))
    load(checkpoint)
    assert {path.name for path in cache.iterdir()} > {"recent-000000000000-0.packed", "notes.txt"}
    assert len(list(cache.iterdir())) == 3
    assert f"removed packed weights, not used for {packed_cache.KEPT_DAYS} days" in log.text


def test_use_keeps_a_file(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(checkpoint)
    os.utime(path_of(cache), (1e9, 1e9))
    from_cache(monkeypatch, checkpoint)
    assert path_of(cache).stat().st_mtime > time.time() - 3600


# Where nothing is kept


def test_an_unsafe_folder_is_not_used(checkpoint: Path, cache: Path, log: Any) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    load(checkpoint)
    assert not list(cache.iterdir())
    assert f"packed weights are neither read nor kept: others than its owner may write to {cache}" in log.text


def test_an_unsafe_file_is_not_used(checkpoint: Path, cache: Path, log: Any) -> None:
    load(checkpoint)
    path = path_of(cache)
    path.chmod(0o666)
    load(checkpoint)
    assert f"made and kept anew: others than its owner may write to {path}" in log.text
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_does_no_harm(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, log: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 << 20))
    load(checkpoint)
    assert re.search(r"packed weights are not kept: 0\.0\d GB and 1\.07 more must be free", log.text)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setenv("RTP_LLM_PACKED_CACHE", str(cache))
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fail)
        load(checkpoint)
    assert "packed weights are not kept: [Errno 28] No space left on device" in log.text
    assert not list(cache.iterdir())


def test_another_writer_is_left_alone(checkpoint: Path, cache: Path, log: Any) -> None:
    load(checkpoint)
    path = path_of(cache)
    path.unlink()
    with path.with_suffix(".new").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        load(checkpoint)
        assert f"another process keeps these packed weights: {path}" in log.text
        assert not path.exists() and path.with_suffix(".new").exists()
    load(checkpoint)  # that one died
    assert path.exists() and not path.with_suffix(".new").exists()


LOADING = """
import sys
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.models.loader import load_model
config = ModelConfig.from_pretrained(sys.argv[1], dtype="bfloat16")
for _ in range(3):
    load_model(config, config.model_path, quantization="int8", packed_cache=True)
"""


def test_two_at_once(checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "loading.py"
    script.write_text(LOADING)
    two = [WarmPython([str(script), str(checkpoint)], tmp_path, os.environ, out=1, err=2) for _ in range(2)]
    assert [process.wait(timeout=240) for process in two] == [0, 0]
    assert [path.suffix for path in cache.iterdir()] == [".packed"]
    plain = load(checkpoint, quantization="int8", packed_cache=False)
    assert_same(plain, from_cache(monkeypatch, checkpoint, quantization="int8"))


def test_models_that_load_themselves_are_not_kept(
    checkpoint: Path, cache: Path, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = ModelRegistry.models["LlamaForCausalLM"]

    class LoadsItself(llama):  # type: ignore[misc, valid-type]
        def load_weights(self, weights: Any) -> Any:
            return AutoWeightsLoader(self).load_weights(weights)

    monkeypatch.setitem(ModelRegistry.models.layers[0], "LlamaForCausalLM", LoadsItself)
    load(checkpoint)
    assert "not kept: LoadsItself has its own load_weights" in log.text
    assert not cache.exists()


def test_models_whose_loaders_set_more_are_not_kept(
    checkpoint: Path, cache: Path, log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_norm = torch.Tensor.copy_

    class Counts(ModelRegistry.models["LlamaForCausalLM"]):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            norm = self.model.norm
            norm.times = 0

            def count(param: torch.Tensor, tensor: torch.Tensor, *rest: Any) -> None:
                norm.times += 1
                load_norm(param.data, tensor)

            norm.weight.weight_loader = count

    monkeypatch.setitem(ModelRegistry.models.layers[0], "LlamaForCausalLM", Counts)
    load(checkpoint)
    assert "not kept: loading also sets times of model.norm (RMSNorm)" in log.text
    assert not list(cache.iterdir())


def test_dummy_weights_hidden_parameters_and_other_devices(checkpoint: Path, cache: Path, log: Any) -> None:
    load(checkpoint, load_format="dummy")
    assert "dummy weights are not kept" in log.text
    with hidden_parameters():
        load(checkpoint)
    assert "not kept: its parameters are hidden" in log.text
    with pytest.raises(ValueError, match=r"the device 'reference' has none: leave it out"):
        load(checkpoint, device="reference")
    assert not cache.exists()
