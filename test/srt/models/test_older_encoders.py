"""Encoders whose first checkpoints came with code of their own, as they were published, against transformers'."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pooled import TOLERANCE, hidden, numbers, open_pooled, prompts_for, reference_model

from rtp_llm.srt.configs.hf_config import ModelConfigError
from tiny_models import make_tiny

NTK = {"type": "ntk", "factor": 2.0}
# What the configurations of the first checkpoints said beside sizes, and transformers does not read.
NEW = {
    "model_type": "new",
    "auto_map": {"AutoConfig": "configuration.NewConfig"},
    "hidden_act": "gelu",
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
    "pack_qkv": True,
    "position_embedding_type": "rope",
    "rope_theta": 500.0,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
}
NOMIC = {
    "activation_function": "swiglu",
    "auto_map": {"AutoConfig": "configuration_hf_nomic_bert.NomicBertConfig"},
    "causal": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_base": 333,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "use_rms_norm": False,
}
OLD_SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}
TODAY = ("rope_parameters", "dtype", "hidden_act", "transformers_version", "head_dim")


def as_published(folder: str, to: Path, entries: dict[str, Any], sizes: dict[str, str] | None = None) -> str:
    """Copy a checkpoint, with the configuration in the spelling of the first ones."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config = {(sizes or {}).get(key, key): value for key, value in config.items() if key not in TODAY}
    (to / "config.json").write_text(json.dumps(config | entries))
    return str(to)


def check(folder: str, model: Any, task: str, expect: Any) -> None:
    prompts = prompts_for(folder)
    with open_pooled(folder) as engine:
        results = engine.encode(input_ids=prompts, task=task, normalize=False)
    for prompt, result in zip(prompts, results, strict=True):
        with torch.no_grad():
            wanted = expect(model(input_ids=torch.tensor([prompt])))
        torch.testing.assert_close(numbers(result).reshape(wanted.shape), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("scaling", [None, NTK], ids=["plain", "ntk"])
def test_gte_as_its_first_checkpoints(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    theta = {"rope_type": "default", "rope_theta": 500.0}
    whole = make_tiny("GteForSequenceClassification", tmp_path / "whole", num_labels=1, rope_parameters=theta)
    entries = NEW | {"architectures": ["NewForSequenceClassification"], "rope_scaling": scaling}
    published = as_published(whole, tmp_path / "published", entries)
    model = reference_model(whole, "GteForSequenceClassification")
    if scaling is not None:  # frequencies as the published code had them (fixed NTK)
        rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
        head_dim = 2 * len(rotary.inv_freq)
        powers = torch.arange(0, head_dim, 2).float() / head_dim
        rotary.inv_freq.copy_(1 / (500.0 * 2) ** powers / 2 ** (2 / head_dim))
    check(published, model, "score", lambda outputs: outputs.logits[0])
    reference_model.cache_clear()


def test_nomic_as_its_first_checkpoints(tmp_path: Path) -> None:
    theta = {"rope_type": "default", "rope_theta": 333.0}
    whole = make_tiny("NomicBertModel", tmp_path / "whole", rope_parameters=theta, layer_norm_eps=1e-3)
    published = as_published(whole, tmp_path / "published", NOMIC, OLD_SIZES)
    model = transformers.NomicBertModel.from_pretrained(whole, dtype=torch.float32).eval()
    check(published, model, "embed", lambda outputs: hidden(model, outputs).mean(0))


def test_inputs_longer_than_those_of_the_training_are_refused_where_they_need_another_base(tmp_path: Path) -> None:
    whole = make_tiny("NomicBertModel", tmp_path / "whole")
    entries = NOMIC | {"rotary_scaling_factor": 2, "max_trained_positions": 12}
    with open_pooled(as_published(whole, tmp_path / "published", entries, OLD_SIZES)) as engine:
        assert engine.model_config.context_length == 12


@pytest.mark.parametrize(
    ("architecture", "entries", "message"),
    [
        ("GteModel", NEW | {"logn_attention_scale": True}, "logn_attention_scale must be False, not True"),
        ("GteModel", NEW | {"position_embedding_type": "absolute"}, "must be 'rope', not 'absolute'"),
        ("GteModel", NEW | {"rope_scaling": NTK | {"mixed_b": 2}}, "a positive factor and no mixed_b"),
        ("NomicBertModel", NOMIC | {"num_experts": 8}, "num_experts must be 0, not 8"),
        ("NomicBertModel", NOMIC | {"activation_function": "gelu"}, "one of .* not 'gelu'"),
        ("NomicBertModel", NOMIC | {"prenorm": True}, "prenorm must be False, not True"),
    ],
)
def test_what_is_not_computed_is_refused(
    tmp_path: Path, architecture: str, entries: dict[str, Any], message: str
) -> None:
    whole = make_tiny(architecture, tmp_path / "whole")
    with pytest.raises(ModelConfigError, match=message):
        open_pooled(as_published(whole, tmp_path / "published", entries))
