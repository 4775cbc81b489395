"""``rtp-llm verify`` names module and cause of many planted mistakes, and finds nothing in what is right."""

from pathlib import Path

import pytest
import torch
import transformers
from broken_models import BrokenModel
from planted_mistakes import PLANTED, SEEING
from safetensors.torch import load_file
from seeing_twins import SEEING_TWINS

from parity import rewrite_tensors
from rtp_llm import ModelRegistry
from rtp_llm.srt.checkpoint import read_model_config
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.layers.delta_rule import GatedDeltaRule
from rtp_llm.srt.layers.mamba import StateSpaceDual
from rtp_llm.srt.model_traits import KeepsState
from rtp_llm.tools.verify.locate import compare, first_difference, pass_over_embedding
from rtp_llm.tools.verify.options import VerifyOptions
from rtp_llm.tools.verify.prompts import Prompt
from rtp_llm.tools.verify.run import record, verify
from rtp_llm.tools.verify.sides import OurModel, TheirModel
from tiny_models import make_tiny, tiny_model

QUICK = (
    "sigmoid in the place of softmax",
    "latent rotation by halves",
    "pixel shuffle by columns",
    "state of a convolution in the other order",
    "rotated everywhere, SmolLM3",
    "mean of squares in bfloat16",
    "parts of a projection turned round",
)
TEXT_MODELS = sorted(
    name
    for name in ModelRegistry.get_generating_archs()
    if name.endswith(("ForCausalLM", "HeadModel")) and hasattr(transformers, name)
)
IDS = [(7 * i * i + 3 * i) % 90 + 3 for i in range(40)]


def server_args(model_dir: str) -> ServerArgs:
    return ServerArgs(model_path=model_dir, dtype="float32", device="cpu", context_length=512, log_level="error")


def make(broken: BrokenModel, directory: Path) -> str:
    if broken.checkpoint in SEEING_TWINS:
        return SEEING_TWINS[broken.checkpoint].make(directory)
    if not broken.checkpoint.endswith(("ForCausalLM", "HeadModel")):
        return tiny_model(broken.checkpoint)
    model_dir = make_tiny(broken.checkpoint, directory, **broken.config)
    if any(name.endswith("correction_bias") for name in load_file(directory / "model.safetensors")):
        rewrite_tensors(model_dir, with_correction_biases)
    return model_dir


def with_correction_biases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transformers begins with zeros, which choose nothing."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.3 * torch.randn(tensor.shape, generator=generator) if name.endswith("correction_bias") else tensor
        for name, tensor in tensors.items()
    }


def check(broken: BrokenModel, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    args = server_args(make(broken, tmp_path / "checkpoint"))
    options = VerifyOptions(max_new_tokens=4, long_len=40, model_class=broken.write(tmp_path))
    report = verify(args, options)
    assert not report.agrees and report.finding is not None, report
    found = report.finding
    assert (found.module, found.part) == (broken.module, broken.part), found
    assert "".join(found.causes).startswith(broken.cause) and bool(found.causes) == bool(broken.cause), found


@pytest.mark.slow
@pytest.mark.parametrize("broken", PLANTED, ids=lambda broken: f"{broken.file}: {broken.name}")
def test_planted_mistakes_are_explained(broken: BrokenModel, tmp_path: Path) -> None:
    check(broken, tmp_path)


@pytest.mark.parametrize(
    "broken", [broken for broken in PLANTED if broken.name in QUICK], ids=lambda broken: broken.name
)
def test_a_few_planted_mistakes(broken: BrokenModel, tmp_path: Path) -> None:
    check(broken, tmp_path)


def test_rows_that_are_too_many_for_their_placeholders(tmp_path: Path) -> None:
    change = ("F.avg_pool2d(grid, self.kernel_size)", "F.avg_pool2d(grid, self.kernel_size, stride=1)")
    broken = BrokenModel("", "gemma3_mm", (change,), "Gemma3ForConditionalGeneration", "", "", "")
    (tmp_path / "checkpoint").mkdir()
    options = VerifyOptions(max_new_tokens=4, long_len=40, model_class=broken.write(tmp_path))
    report = verify(server_args(make(broken, tmp_path / "checkpoint")), options)
    assert report.failure.partition("First: ")[2] == (
        "model.multi_modal_projector.mm_soft_emb_norm, its input: 49 rows, the reference's 16: it is the mean over "
        "windows of 2 x 2, 1 x 1 apart, in a grid of 8 x 8, of output of model.vision_tower.post_layernorm; the "
        "reference's is the mean over windows of 2 x 2 in a grid of 8 x 8"
    )


def test_nearly_all_causes_are_known() -> None:
    """The places of all mistakes are found; the causes of the rest are not among the experiments."""
    assert len(PLANTED) > 90 and len(SEEING) > 30
    assert sum(not broken.cause for broken in PLANTED) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TEXT_MODELS)
def test_nothing_is_blamed_in_a_right_model(architecture: str, tmp_path: Path) -> None:
    args = server_args(make_tiny(architecture, tmp_path))
    config = read_model_config(args)
    ours, theirs = OurModel(args, config, len(IDS) + 1), TheirModel(args, config)
    evidence = record("float32", ours, theirs, Prompt("", IDS), 4)
    differences = compare(evidence.ours, evidence.theirs)
    differences = pass_over_embedding(differences, evidence.ours, evidence.theirs, evidence.tolerance)
    assert first_difference(differences, evidence.tolerance) is None
    assert len(differences) > 20
    with_states = [name for name, module in ours.model.named_modules() if isinstance(module, KeepsState)]
    assert len(evidence.states) == 2 * len(with_states) and not evidence.wrong_states()
    assert set(evidence.theirs.convolutions) == around(ours.model, CausalConv1d)
    assert set(evidence.theirs.scans) == around(ours.model, GatedDeltaRule, StateSpaceDual)


def around(model: torch.nn.Module, *kinds: type[torch.nn.Module]) -> set[str]:
    """The modules that have one of these layers."""
    return {name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, kinds)}
