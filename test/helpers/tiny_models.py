"""Tiny random float32 checkpoints of every kind that the engine serves, and what transformers answers with them.

A test asks for a checkpoint by name and gets a directory::

    model_dir = tiny_model("qwen3-mixed-window7")
    expected = reference(model_dir, prompt_ids=(5, 9, 2), max_new_tokens=20)

Checkpoints are made once and kept in the system's temporary folder under a name that covers everything they depend on,
so that parallel test processes and later runs share them.
"""

import hashlib
import inspect
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from plain_models import PLAIN_MODELS

from rtp_llm.srt.worker.philox import exponential

ORIGINAL_LEN = 64  # the context length that every tiny model pretends to have been trained with
TIE_GAP = 1e-4  # logits closer than this are a tie: either token is right


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint's recipe. ``config`` overrides the defaults in ``_config``; ``rope`` is its ``rope_parameters``."""

    name: str
    architecture: str
    config: dict[str, Any]
    rope: dict[str, Any] = field(default_factory=dict)
    seed: int = 0  # of the weights; chosen so that greedy text does not fall into a short loop at once

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding windows of its layers (tokens visible to a query, its own included); empty: none."""
        window = self.config.get("sliding_window")
        return (window,) if window else ()

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]


def _longrope(head_dim: int) -> dict[str, Any]:
    half = head_dim // 2
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(half)],
        "long_factor": [1.5 + 0.7 * i for i in range(half)],
        "original_max_position_embeddings": ORIGINAL_LEN,
    }


LINEAR = {"rope_type": "linear", "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL_LEN}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_LEN,
}


def _layers(*kinds: str) -> list[str]:
    return [{"full": "full_attention", "window": "sliding_attention"}[kind] for kind in kinds]


# Partial rotation is absent: transformers' classes of these four architectures do not implement it.
TINY_MODELS: dict[str, TinyModel] = {
    model.name: model
    for model in (
        TinyModel(
            "llama-default",
            "LlamaForCausalLM",
            dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, vocab_size=131),
            seed=1,
        ),
        TinyModel(
            "llama-linear-tied-bias",
            "LlamaForCausalLM",
            dict(hidden_size=54, num_attention_heads=6, num_key_value_heads=2, head_dim=16, vocab_size=97)
            | dict(tie_word_embeddings=True, attention_bias=True),
            LINEAR,
            seed=1,
        ),
        TinyModel(
            "llama-dynamic-mlp-bias",
            "LlamaForCausalLM",
            dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, vocab_size=211, mlp_bias=True),
            DYNAMIC,
        ),
        TinyModel(
            "llama-llama3-tied",
            "LlamaForCausalLM",
            dict(hidden_size=72, num_attention_heads=3, num_key_value_heads=3, vocab_size=173)
            | dict(tie_word_embeddings=True, max_position_embeddings=512),
            LLAMA3 | {"rope_theta": 5e5},
            seed=1,
        ),
        TinyModel(
            "llama-yarn",
            "LlamaForCausalLM",
            dict(hidden_size=57, num_attention_heads=3, num_key_value_heads=3, head_dim=10, vocab_size=263)
            | dict(max_position_embeddings=256, intermediate_size=91),
            YARN,
        ),
        TinyModel(
            "llama-longrope",
            "LlamaForCausalLM",
            dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, vocab_size=151)
            | dict(max_position_embeddings=256),
            _longrope(10),
        ),
        TinyModel(
            "mistral-full-tied",
            "MistralForCausalLM",
            dict(hidden_size=50, num_attention_heads=4, num_key_value_heads=1, head_dim=16, vocab_size=199)
            | dict(sliding_window=None, tie_word_embeddings=True),
            seed=2,
        ),
        TinyModel(
            "mistral-window7",
            "MistralForCausalLM",
            dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, vocab_size=307, sliding_window=7),
            {"rope_theta": 1e6},
        ),
        TinyModel(
            "mistral-window16-yarn",
            "MistralForCausalLM",
            dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=3, vocab_size=127, sliding_window=16)
            | dict(max_position_embeddings=256),
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.2},
            seed=1,
        ),
        TinyModel(
            "qwen2-default-tied",
            "Qwen2ForCausalLM",
            dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, vocab_size=331)
            | dict(tie_word_embeddings=True, rms_norm_eps=1e-5),
            {"rope_theta": 1e6},
        ),
        TinyModel(
            "qwen2-mixed-window16",
            "Qwen2ForCausalLM",
            dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, vocab_size=149)
            | dict(use_sliding_window=True, sliding_window=16, layer_types=_layers("full", "window", "window")),
            seed=1,
        ),
        TinyModel(
            "qwen2-dynamic",
            "Qwen2ForCausalLM",
            dict(hidden_size=72, num_attention_heads=3, num_key_value_heads=3, vocab_size=113),
            DYNAMIC | {"factor": 3.0},
        ),
        TinyModel(
            "qwen3-default",
            "Qwen3ForCausalLM",
            dict(hidden_size=52, num_attention_heads=6, num_key_value_heads=2, head_dim=16, vocab_size=281),
            {"rope_theta": 5e6},
        ),
        TinyModel(
            "qwen3-mixed-window7-tied",
            "Qwen3ForCausalLM",
            dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=1, head_dim=24, vocab_size=179)
            | dict(use_sliding_window=True, sliding_window=7, layer_types=_layers("window", "full", "window"))
            | dict(tie_word_embeddings=True),
        ),
        TinyModel(
            "qwen3-longrope-bias-gelu",
            "Qwen3ForCausalLM",
            dict(hidden_size=56, num_attention_heads=4, num_key_value_heads=2, head_dim=10, vocab_size=167)
            | dict(attention_bias=True, hidden_act="gelu_pytorch_tanh", max_position_embeddings=256),
            _longrope(10),
        ),
        # For tensor parallelism over two ranks: heads divide by two, the vocabulary does not.
        TinyModel(
            "llama-tp",
            "LlamaForCausalLM",
            dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=131, attention_bias=True)
            | dict(mlp_bias=True),
        ),
        TinyModel(
            "mistral-tp",
            "MistralForCausalLM",
            dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=1, head_dim=10, vocab_size=97)
            | dict(sliding_window=7, tie_word_embeddings=True),
        ),
        TinyModel(
            "qwen2-tp",
            "Qwen2ForCausalLM",
            dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, vocab_size=173)
            | dict(tie_word_embeddings=True),
        ),
        TinyModel(
            "qwen3-tp",
            "Qwen3ForCausalLM",
            dict(hidden_size=52, num_attention_heads=2, num_key_value_heads=1, head_dim=24, vocab_size=211)
            | dict(use_sliding_window=True, sliding_window=16, layer_types=_layers("full", "window", "full")),
        ),
    )
}


@cache
def tiny_model(name: str) -> str:
    """The directory of the named checkpoint, made now if it was not there."""
    recipe = TINY_MODELS[name]
    home = _cache_home() / f"{name}-{_fingerprint(recipe)}"
    if not home.is_dir():
        making = Path(tempfile.mkdtemp(dir=home.parent, prefix=".making-"))
        try:
            _make(recipe, making)
            making.rename(home)
        except OSError:
            if not home.is_dir():  # else another process was quicker, and its checkpoint is the same
                raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return str(home)


# What makes a configuration of any architecture tiny: set where the architecture has such a field. Heads and experts
# divide by two, the vocabulary does not.
_TINY_SIZES: dict[str, Any] = dict(
    hidden_size=64,
    word_embed_proj_dim=64,
    intermediate_size=96,
    ffn_dim=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    max_position_embeddings=512,
    sliding_window=24,
    # mixtures of experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=48,
    shared_intermediate_size=48,
    intermediate_size_mlp=80,
    moe_num_experts=4,
    moe_k=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    # multi-head latent attention
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    index_n_heads=4,
    index_head_dim=16,
    # embeddings of layers
    vocab_size_per_layer_input=99,
    hidden_size_per_layer_input=12,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
# Architectures that are another's class with a configuration of their own.
_OTHER_CLASSES: dict[str, tuple[str, str | None]] = {
    "InternLM3ForCausalLM": ("LlamaForCausalLM", "InternLM3Config"),
    "MiniMaxM1ForCausalLM": ("MiniMaxForCausalLM", None),
    "MiniMaxText01ForCausalLM": ("MiniMaxForCausalLM", None),
}
# Fields that a configuration wants and has no value of its own for.
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
_WANTED = {
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"] * 2, "mamba_chunk_size": 8},
    "KimiLinearForCausalLM": {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_heads": 4,
        "linear_head_dim": 8,
    },
    "Lfm2ForCausalLM": _CONVOLUTIONS,
    "Lfm2MoeForCausalLM": _CONVOLUTIONS,
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16},
    # transformers applies a least step to whole prompts, and not to single tokens
    "NemotronHForCausalLM": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 4, "time_step_min": 1e-9},
}
_TWIN_CHARACTERS = [chr(code) for code in [*range(0x21, 0x7F), 0x0120, 0x010A]]  # as bytes are written: space, newline


def make_tiny(architecture: str, directory: str | Path, **overrides: Any) -> str:
    """Writes a tiny random float32 checkpoint, tokenizer included, of any causal language model of transformers or
    of ``plain_models``.

    Each id stands for one character, so texts differ where ids do. ``overrides`` are fields of its configuration.

    Raises:
        ValueError: there is no such class.
    """
    class_name, config_name = _OTHER_CLASSES.get(architecture, (architecture, None))
    model_class = PLAIN_MODELS.get(class_name) or getattr(transformers, class_name, None)
    if model_class is None or not issubclass(model_class, transformers.PreTrainedModel):
        raise ValueError(f"transformers {transformers.__version__} has no model class {architecture!r}")
    tokenizer = _character_tokenizer()
    config_class = getattr(transformers, config_name) if config_name else model_class.config_class
    config = _tiny_config(config_class, {"vocab_size": len(tokenizer)} | _WANTED.get(architecture, {}) | overrides)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # what _disturb does not set anew
        model = model_class(config).to(torch.float32)
    _disturb(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if class_name != architecture:
        path = Path(directory, "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))
    return str(directory)


def make_tiny_vision(
    architecture: str,
    directory: str | Path,
    config: dict[str, Any],
    special_tokens: Sequence[str] = (),
    files: dict[str, Any] | None = None,
) -> str:
    """As ``make_tiny``, of a model that sees.

    Args:
        config: fields of its configuration, ``text_config`` and ``vision_config`` among them; the vocabulary's size is
            filled in, and where ``text_config`` names no sizes, tiny ones.
        special_tokens: tokens of the tokenizer beside its characters; ``special_id`` tells their ids.
        files: further JSON files of the checkpoint, such as ``preprocessor_config.json``.
    """
    model_class = getattr(transformers, architecture)
    tokenizer = _character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    text = _TINY_TEXT | {"vocab_size": len(tokenizer) + 5} | config.get("text_config", {})
    made = model_class.config_class(**config | {"text_config": text})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(made).to(torch.float32)
    _disturb(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for name, content in (files or {}).items():
        Path(directory, name).write_text(json.dumps(content))
    return str(directory)


_TINY_TEXT = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def special_id(special_tokens: Sequence[str], token: str) -> int:
    """The id that ``make_tiny_vision`` gives one of its special tokens."""
    return 3 + len(_TWIN_CHARACTERS) + list(special_tokens).index(token)


def _character_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes, but ASCII's printable ones only, and no merges.

    For some model types transformers keeps only vocabulary and merges of a tokenizer; for this kind that is all.
    """
    vocabulary = ["<s>", "<|endoftext|>", "<unk>", *_TWIN_CHARACTERS]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>"
    )


def _tiny_config(config_class: Any, overrides: dict[str, Any]) -> transformers.PretrainedConfig:
    usual, names = config_class(), config_class.attribute_map
    sizes = {
        name: value
        for name, value in _TINY_SIZES.items()
        if _has_field(usual, name) and not isinstance(getattr(config_class, name, None), property)
    }
    if "kv_lora_rank" in sizes:  # each head has keys of its own, and the rotated part is what head_dim means
        sizes |= {"num_key_value_heads": sizes["num_attention_heads"], "head_dim": sizes["qk_rope_head_dim"]}
    config = config_class(**{names.get(name, name): value for name, value in (sizes | overrides).items()})
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_parameters" not in overrides and "original_max_position_embeddings" in rope:
        # Stretched as far as usual, but to the tiny context.
        rope["original_max_position_embeddings"] = int(config.max_position_embeddings / rope.get("factor", 1.0))
    return config


def _has_field(config: transformers.PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:  # transformers raises it if layers differ in the field
        return True


def _disturb(model: torch.nn.Module) -> None:
    """Weights that make the answers depend on everything. Vectors (norms, biases) stay near what they begin with."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.data.add_(0.2 * noise)
        elif parameter is model.get_input_embeddings().weight:
            parameter.data.copy_(0.1 * noise)
        elif parameter is getattr(model.get_output_embeddings(), "weight", None):
            parameter.data.copy_(0.4 * noise)
        else:
            parameter.data.copy_(1.2 * noise / math.sqrt(parameter.shape[-1]))


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """One prompt of random ids per length; no id is the end-of-sequence id, which is the vocabulary's last."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size - 1) for _ in range(length)] for length in lengths]


def is_close_race(scores: torch.Tensor, params: dict[str, Any], position: int, ids: tuple[int, int]) -> bool:
    """Whether last digits decide which of two tokens is drawn from these logits ([vocab_size] float64)."""
    key = torch.tensor([params["seed"]]), torch.tensor([position])
    times = exponential(*key, len(scores))[0].log() - scores / params["temperature"]
    return bool((times[ids[0]] - times[ids[1]]).abs() < 1e-3)


class Reference(NamedTuple):
    """What transformers answers.

    ``gaps[i]`` is how far the logit of ``output_ids[i]`` lies above the second best. ``prompt_logprobs[i]`` is that of
    prompt token ``i + 1`` after tokens ``0 .. i``, so there is one fewer than prompt tokens.
    """

    output_ids: list[int]
    gaps: list[float]
    prompt_logprobs: list[float]
    output_logprobs: list[float]


@lru_cache(maxsize=1024)
def reference(model_dir: str, prompt_ids: tuple[int, ...], max_new_tokens: int) -> Reference:
    """Greedy ids and prompt logprobs by transformers in float32, one prompt at a time; no end of sequence ends it."""
    model = _reference_model(model_dir)
    ids = torch.tensor([prompt_ids])
    with torch.inference_mode():
        _forget_lengths(model)
        logits = model(ids).logits[0].float()
        prompt_logprobs = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        _forget_lengths(model)
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    steps = torch.stack([step[0] for step in generated.logits]).float()
    best = steps.topk(2).values
    output_ids = generated.sequences[0, len(prompt_ids) :]
    output_logprobs = steps.log_softmax(-1).gather(1, output_ids[:, None])[:, 0]
    gaps = best[:, 0] - best[:, 1]
    return Reference(output_ids.tolist(), gaps.tolist(), prompt_logprobs.tolist(), output_logprobs.tolist())


def assert_same_ids(ours: Sequence[int], expected: Reference, what: str = "") -> None:
    """Equal ids, or equal up to a step where the reference's two best are a tie; that is printed."""
    for step, (our_id, their_id) in enumerate(zip(ours, expected.output_ids, strict=True)):
        if our_id == their_id:
            continue
        gap = expected.gaps[step]
        message = f"{what}: step {step} gave id {our_id}, the reference {their_id}; its best two are {gap:.2e} apart"
        assert gap < TIE_GAP, f"{message}\nours:      {list(ours)}\nreference: {expected.output_ids}"
        print(f"tie accepted: {message}")
        return


def _cache_home() -> Path:
    home = Path(tempfile.gettempdir()) / f"rtp_llm_tiny_models_{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    return home


def _fingerprint(recipe: TinyModel) -> str:
    parts = [repr(recipe), inspect.getsource(_make), inspect.getsource(_config), inspect.getsource(_randomize)]
    parts += [transformers.__version__, torch.__version__]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _make(recipe: TinyModel, folder: Path) -> None:
    model_class = getattr(transformers, recipe.architecture)
    model = model_class(_config(recipe, model_class.config_class)).to(torch.float32)
    _randomize(model, recipe.seed)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [recipe.architecture]


def _config(recipe: TinyModel, config_class: type[transformers.PretrainedConfig]) -> transformers.PretrainedConfig:
    defaults = dict(
        intermediate_size=88,
        num_hidden_layers=3,
        max_position_embeddings=ORIGINAL_LEN,
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_id=recipe.config["vocab_size"] - 1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | recipe.rope,
    )
    return config_class(**(defaults | recipe.config))


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that make the answers depend on everything: no flat logits, no unit norms, no zero biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data.copy_(1.0 + 0.2 * noise)
        elif name.endswith(".bias"):
            parameter.data.copy_(0.1 * noise)
        elif "embed_tokens" in name:
            parameter.data.copy_(0.1 * noise)  # small: a tied head would else only repeat the last token
        elif "lm_head" in name:
            parameter.data.copy_(0.4 * noise)
        else:
            parameter.data.copy_(1.2 * noise / math.sqrt(parameter.shape[1]))


@lru_cache(maxsize=2)
def _reference_model(model_dir: str) -> Any:
    config = json.loads(Path(model_dir, "config.json").read_text())
    # Falcon's eager code adds ALiBi's biases twice, to the mask and to the scores; its own default is sdpa.
    implementation = "sdpa" if config["model_type"] == "falcon" else "eager"
    plain = PLAIN_MODELS.get(config["architectures"][0])
    model = (plain or transformers.AutoModelForCausalLM).from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation=implementation
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def _forget_lengths(model: Any) -> None:
    """A new rotary module: dynamic NTK keeps the longest length it has seen, and so would mix prompts up."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is not None:  # GPT-2 has none
        model.base_model.rotary_emb = type(rotary)(model.config)
