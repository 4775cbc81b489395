"""The sweep over vLLM's model files, about a folder that looks like vLLM's, with files of these tests' own writing."""

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

from warm_python import ROOT, run_python

FOLDER = ROOT / "benchmark" / "porting"
sys.path.insert(0, str(FOLDER))
import checkpoints  # noqa: E402
import published  # noqa: E402
import regroup  # noqa: E402
import rounding  # noqa: E402
import stand_ins  # noqa: E402
import vllm_files  # noqa: E402

PAGE = ROOT / "docs" / "porting.md"
REGISTRY = """
_TEXT_GENERATION_MODELS = {
    # comments stand here, too
    "HeliumForCausalLM": ("helium", "HeliumForCausalLM"),
    "NobodysForCausalLM": ("nobody", "NobodysForCausalLM"),
    "GemmaForCausalLM": ("broken", "GemmaForCausalLM"),
    "ElsewhereForCausalLM": ("vllm.models.elsewhere", "ElsewhereForCausalLM"),
}
_SPECULATIVE_DECODING_MODELS = {"DraftModel": ("draft", "DraftModel")}
_MULTIMODAL_MODELS = {"SeeingForConditionalGeneration": ("seeing", "SeeingForConditionalGeneration")}
"""


def helium() -> str:
    """vLLM's form of Helium, from the page's example."""
    diff = re.search(r"<!-- test: model helium -->\n```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert diff is not None
    return "".join(f"{line[1:]}\n" for line in diff[1].splitlines() if not line.startswith("+"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder that holds ``vllm/``."""
    models = tmp_path / "source" / "vllm" / "model_executor" / "models"
    models.mkdir(parents=True)
    (models.parents[1] / "_version.py").write_text("__version__ = version = '0.99.1'\n")
    model = "from vllm.config import VllmConfig\nfrom torch import nn\nclass {}(nn.Module):\n    pass\n"
    files = {
        "__init__": "",
        "utils": "def maybe_prefix(prefix, name):\n    return name\n",
        "registry": REGISTRY,
        "helium": helium(),
        "nobody": model.format("NobodysForCausalLM"),
        "draft": model.format("DraftModel"),
        "broken": "from vllm import x\ndef f(:\n",
        "tower": model.format("Tower"),
        "seeing": "from vllm.multimodal import MULTIMODAL_REGISTRY\n",
    }
    for name, text in files.items():
        (models / f"{name}.py").write_text(text)
    return tmp_path / "source"


def test_text_model_files_are_told_from_multimodal_ones(root: Path) -> None:
    files = vllm_files.model_files(root)
    assert [file.name for file in files] == ["broken", "draft", "helium", "nobody", "tower"]
    assert vllm_files.count_multimodal(root) == 1 and vllm_files.version_of(root) == "0.99.1"
    tasks = {file.name: file.tasks() for file in files}
    assert tasks["helium"] == ["text generation"] and tasks["draft"] == ["drafter"] and tasks["tower"] == []


def test_a_wheel_is_unpacked(root: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-0.99.1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in root.rglob("*.py"):
            archive.write(path, path.relative_to(root))
        archive.writestr("vllm/library.so", "not taken")
    with vllm_files.unpacked(wheel) as unpacked:
        assert len(vllm_files.model_files(unpacked)) == 5 and not (unpacked / "vllm" / "library.so").exists()
    with pytest.raises(vllm_files.SourceError, match=r"registry\.py"), vllm_files.unpacked(tmp_path):
        pass


def test_fields_of_published_configurations_follow_from_the_others() -> None:
    import transformers

    config = transformers.Glm4MoeConfig(hidden_size=64, num_attention_heads=4)
    source = "config.head_dim + config.n_group + config.get_text_config() + config.first_k_dense_replace"
    assert published.published_fields(config, source) == {"head_dim": 16}
    source = """getattr(config, "scoring_func", "softmax") + config.moe_layer_freq % 2 + config.zero_expert_type
        getattr(config, "add_swa_attention_sink_bias", False)"""
    fields = {"zero_expert_type": "identity", "add_swa_attention_sink_bias": True}
    assert published.published_fields(config, source) == fields
    assert published.switches(config, "1 parameters were not set: lm_head.bias [99]") == {"attention_bias": True}


def test_a_checkpoint_gets_the_tensors_that_published_ones_have(tmp_path: Path) -> None:
    """Gates of experts that return their input go; a norm that transformers passes over comes."""
    import torch
    from safetensors.torch import load_file, save_file

    folder, target = tmp_path / "made", tmp_path / "published"
    folder.mkdir()
    names = ["norm.weight", *(f"mlp.experts.{expert}.gate_proj.weight" for expert in range(3))]
    save_file({name: torch.zeros(2) for name in names}, folder / "model.safetensors")
    config = {"n_routed_experts": 2, "zero_expert_num": 1, "sliding_window": 8}
    (folder / "config.json").write_text(json.dumps(config))
    assert checkpoints.as_published(folder, target, "a parameter")
    assert sorted(load_file(target / "model.safetensors")) == sorted(names[:-1])
    assert not checkpoints.as_published(target, tmp_path / "again", "a parameter")
    assert checkpoints.with_window(folder, target, -1)
    assert json.loads((target / "config.json").read_text()) == config | {"sliding_window": 7}


def test_tensors_are_put_together_and_taken_apart() -> None:
    import torch

    q, k, v = torch.arange(8.0)[:, None], 10 + torch.arange(4.0)[:, None], 20 + torch.arange(4.0)[:, None]
    tensors = {"x.q.weight": q, "x.k.weight": k, "x.v.weight": v, "x.norm.weight": torch.ones(1)}
    grouped = regroup.joined(tensors, ("q", "k", "v"), "qkv", regroup.by_key_heads(2))
    assert sorted(grouped) == ["x.norm.weight", "x.qkv.weight"]
    assert grouped["x.qkv.weight"].flatten().tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    packed = {"x.experts.gate_up_proj": torch.arange(8.0).view(2, 4, 1), "x.experts.down_proj": torch.zeros(2, 1, 2)}
    apart = regroup.experts_apart(packed, "experts")
    assert len(apart) == 6 and apart["x.experts.1.up_proj.weight"].flatten().tolist() == [6, 7]
    assert apart["x.experts.0.down_proj.weight"].shape == (1, 2)
    halves = regroup.halves_apart({"x.both.weight": torch.arange(4.0)}, "both", "a", "b")
    assert {name: tensor.tolist() for name, tensor in halves.items()} == {"x.a.weight": [0, 1], "x.b.weight": [2, 3]}


@pytest.mark.parametrize(
    "architecture", ["InternLM2ForCausalLM", pytest.param("BailingMoeV2ForCausalLM", marks=pytest.mark.slow)]
)
def test_a_stand_in_answers_as_our_model_of_the_architecture(architecture: str, tmp_path: Path) -> None:
    """Both from a checkpoint of their own form. A model that reads one field otherwise does not agree."""
    from rtp_llm.tools.schedules import BATCHED
    from rtp_llm.tools.tiny_check import check_checkpoint

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    stand_ins.STAND_INS[architecture].make(architecture, theirs, ours)
    assert check_checkpoint(ours, (BATCHED,), lengths=(18,), reference=theirs).agrees
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"rope_theta": 100.0}))
    assert not check_checkpoint(ours, (BATCHED,), lengths=(18,), reference=theirs).agrees


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(stand_ins.STAND_INS))
def test_every_stand_in_can_be_made(architecture: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stand_in = stand_ins.STAND_INS[architecture]
    stand_in.make(architecture, tmp_path / "theirs", tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == [architecture] and config["model_type"]
    assert load_file(tmp_path / "ours" / "model.safetensors")
    assert stand_in.why and stand_in.source.startswith("https://")


@pytest.mark.slow
def test_transformers_parts_from_itself_where_prompts_alone_have_a_least_step(tmp_path: Path) -> None:
    from rtp_llm.tools.schedules import TOLERANCE
    from rtp_llm.tools.tiny_checkpoint import make_tiny_checkpoint

    limited, unlimited = tmp_path / "limited", tmp_path / "unlimited"
    make_tiny_checkpoint("NemotronHForCausalLM", limited)
    assert checkpoints.with_shorter_steps(limited, unlimited)
    assert rounding.own_parting(limited) > TOLERANCE >= rounding.own_parting(unlimited)
    assert not checkpoints.with_shorter_steps(_llama(tmp_path), tmp_path / "none")


def _llama(folder: Path) -> Path:
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder / "llama"


def test_every_file_is_ported_and_compared_or_classified(root: Path, tmp_path: Path) -> None:
    results, table = tmp_path / "results.json", tmp_path / "table.md"
    command = ["benchmark/porting/sweep.py", "--vllm", str(root), "--jobs", "1"]
    done = run_python([*command, "--json", str(results), "--table", str(table)])
    assert done.returncode == 0, done.stderr
    rows = {row["file"]: row for row in json.loads(results.read_text())}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "broken": "not ported",
        "draft": "drafter",
        "helium": "agrees",
        "nobody": "no class in transformers",
        "tower": "part of other models",
    }
    assert rows["helium"]["compared"][0]["difference"] < 1e-3
    assert "broken.py" in rows["broken"]["detail"]
    text = table.read_text()
    assert "vLLM 0.99.1" in text and "5 text model files" in text and "1 of the 1 " in text and "0 of 0 others" in text
    assert "| helium | HeliumForCausalLM | agrees |" in text
