"""Model files of ours, broken in one place each: the mistakes that people make when they write one.

They are made from the real files by replacing text, so that they stay like them.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rtp_llm

MODELS = Path(rtp_llm.__file__).parent / "models_py"


@dataclass(frozen=True)
class BrokenModel:
    """``checkpoint``: a tiny model of ``tiny_models`` by name, or an architecture, to be made with ``config``.

    ``module``, ``part`` and ``cause`` (a part of its text; empty: none) are what is to be found.
    """

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    checkpoint: str
    module: str
    part: str
    cause: str
    config: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> str:
        """Writes the file; returns what --model-class takes."""
        source = (MODELS / f"{self.file}.py").read_text(encoding="utf-8")
        for old, new in self.changes:
            assert source.count(old) == 1, f"{self.name}: {self.file}.py has {source.count(old)} times {old!r}"
            source = source.replace(old, new)
        path = directory / f"broken_{self.file}.py"
        path.write_text(source, encoding="utf-8")
        entry = re.search(r"^EntryClass = (.+)$", source, re.MULTILINE)
        assert entry, f"{self.file}.py has no EntryClass in a line"
        names = re.findall(r"\w+", entry[1])
        return f"{path}:{self.checkpoint if self.checkpoint in names else names[0]}"


ATTENTION = "model.layers.0.self_attn"
NORM_QUERIES = """        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim)))
"""
QWEN3_HEADS = f"""
    def prepare_queries_and_keys(self, positions, q, k):
{NORM_QUERIES}        return self.rotate(positions, q, k)


class Qwen3ForCausalLM"""
NEXT_CLASS = "\n\nclass Qwen3ForCausalLM"
ROPE = "        return rope_of_layer(config, self.head_dim, layer_id)\n"
OTHER_ROPE = """        from rtp_llm.srt.layers.rotary import get_rope, get_rope_config

        base, rope_scaling, _ = get_rope_config(config)
        return get_rope(self.head_dim, base=base, rope_scaling=rope_scaling)
"""
FIRST_NORM = """        hidden_states, residual = self.input_layernorm(hidden_states, residual)
"""
NORMED_RESIDUAL = f"""        is_first = residual is None
{FIRST_NORM}        residual = hidden_states if is_first else residual
"""
NORMS_AND_BLOCKS = (
    FIRST_NORM
    + """        hidden_states = self.get_submodule(self.mixer_name)(positions, hidden_states, forward_batch)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
"""
)
SWAPPED_NORMS = (
    NORMS_AND_BLOCKS.replace("input_layernorm", "other")
    .replace("post_attention_layernorm", "input_layernorm")
    .replace("other", "post_attention_layernorm")
)

TEN_BROKEN_MODELS = (
    BrokenModel(
        "rotary layout",
        "llama",
        ((ROPE, OTHER_ROPE.replace("base=base", "base=base, is_neox_style=False")),),
        "llama-default",
        f"{ATTENTION}.rotary_emb",
        "queries",
        "rotary layout: ours pairs neighbours",
    ),
    BrokenModel(
        "rope scaling ignored",
        "llama",
        ((ROPE, OTHER_ROPE.replace("rope_scaling=rope_scaling", "rope_scaling=None")),),
        "llama-llama3-tied",
        f"{ATTENTION}.rotary_emb",
        "queries",
        "rope scaling: ours none, the reference's llama3",
    ),
    BrokenModel(
        "norms swapped",
        "llama",
        ((NORMS_AND_BLOCKS, SWAPPED_NORMS),),
        "llama-default",
        "model.layers.0.post_attention_layernorm",
        "input",
        "the reference has as input of model.layers.0.input_layernorm",
    ),
    BrokenModel(
        "scores scaled by 1 / head_dim",
        "llama",
        (("self.head_dim**-0.5 if scaling", "self.head_dim**-1.0 if scaling"),),
        "llama-default",
        ATTENTION,
        "attention output",
        "attention scaling: ours 0.125, the reference's 0.353553",
    ),
    BrokenModel(
        "window off by one",
        "mistral",
        (("sliding_window=config.sliding_window,", "sliding_window=config.sliding_window - 1,"),),
        "mistral-window7",
        ATTENTION,
        "attention output",
        "ours 6 tokens, the reference's 7 tokens (off by one)",
    ),
    BrokenModel(
        "gate and up swapped",
        "llama",
        (('["gate_proj", "up_proj"]', '["up_proj", "gate_proj"]'),),
        "llama-default",
        "model.layers.0.mlp.act_fn",
        "input",
        "silu(up_proj) * gate_proj, the reference silu(gate_proj) * up_proj",
    ),
    BrokenModel(
        "norms of heads missing",
        "qwen3",
        ((NEXT_CLASS, QWEN3_HEADS.replace(NORM_QUERIES, "")),),
        "qwen3-default",
        f"{ATTENTION}.q_norm",
        "output",
        "never called",
    ),
    BrokenModel(
        "wrong activation",
        "llama",
        (("            config.hidden_act,\n", '            "gelu",\n'),),
        "llama-default",
        "model.layers.0.mlp.act_fn",
        "input",
        "gelu(gate_proj) * up_proj, the reference silu(gate_proj) * up_proj",
    ),
    BrokenModel(
        "residual taken after the norm",
        "llama",
        ((FIRST_NORM, NORMED_RESIDUAL),),
        "llama-default",
        "model.layers.0.post_attention_layernorm",
        "input",
        "ours is output of model.layers.0.self_attn + output of model.layers.0.input_layernorm; "
        "the reference's is output of model.layers.0.self_attn + output of model.embed_tokens",
    ),
    BrokenModel(
        "biases dropped",
        "llama",
        (("bias=qkv_bias,", "bias=qkv_bias,\n            skip_bias_add=True,"),),
        "llama-linear-tied-bias",
        f"{ATTENTION}.q_proj",
        "output",
        "the bias is not added",
    ),
)

MORE_BROKEN_MODELS = (
    BrokenModel(
        "rotary base",
        "llama",
        ((ROPE, OTHER_ROPE.replace("base=base", "base=20000.0")),),
        "llama-default",
        f"{ATTENTION}.rotary_emb",
        "queries",
        "rotary base: ours 20000, the reference's 10000",
    ),
    BrokenModel(
        "positions off by one",
        "llama",
        (
            (
                "return self.rotary_emb(positions, q, k)",  # of both alike would make no difference
                "return self.rotary_emb(positions + 1, q, k)[0], self.rotary_emb(positions, q, k)[1]",
            ),
        ),
        "llama-default",
        f"{ATTENTION}.rotary_emb",
        "queries",
        "positions are off by +1",
    ),
    BrokenModel(
        "half of each head rotated",
        "llama",
        ((ROPE, OTHER_ROPE.replace("base=base", "base=base, partial_rotary_factor=0.5")),),
        "llama-default",
        f"{ATTENTION}.rotary_emb",
        "queries",
        "rotated components of a head: ours 4, the reference's 8",
    ),
    BrokenModel(
        "not rotated",
        "llama",
        (("return self.rotary_emb(positions, q, k)", "return q, k"),),
        "llama-default",
        ATTENTION,
        "queries",
        "it does not rotate them, and the reference does",
    ),
    BrokenModel(
        "norms of heads after the rotation",
        "qwen3",
        (
            (
                NEXT_CLASS,
                QWEN3_HEADS.replace(
                    NORM_QUERIES, "        q, k = self.rotate(positions, q, k)\n" + NORM_QUERIES
                ).replace("return self.rotate(positions, q, k)", "return q.flatten(1), k.flatten(1)"),
            ),
        ),
        "qwen3-default",
        f"{ATTENTION}.q_norm",
        "input",
        "given rotated queries",
    ),
    BrokenModel(
        "keys in the place of queries",
        "llama",
        (('["q_proj", "k_proj", "v_proj"]', '["k_proj", "q_proj", "v_proj"]'),),
        "llama-llama3-tied",
        f"{ATTENTION}.rotary_emb",
        "queries",
        "it rotates output of model.layers.0.self_attn.k_proj; the reference output of model.layers.0.self_attn.q_proj",
    ),
    BrokenModel(
        "no window",
        "mistral",
        (("sliding_window=config.sliding_window,", "sliding_window=None,"),),
        "mistral-window7",
        ATTENTION,
        "attention output",
        "ours none, the reference's 7 tokens",
    ),
    BrokenModel(
        "norm times 1 + weight",
        "llama",
        (("layers.norm import Norm, RMSNorm", "layers.norm import Norm, GemmaRMSNorm as RMSNorm"),),
        "llama-default",
        "model.layers.0.input_layernorm",
        "output",
        "root-mean-square norm, times 1 + weight",
    ),
    BrokenModel(
        "layer norm",
        "llama",
        (
            ("layers.norm import Norm, RMSNorm", "layers.norm import LayerNorm, Norm, RMSNorm"),
            *(
                (
                    f'"""{doc}"""\n        return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)',
                    f'"""{doc}"""\n        return LayerNorm(config.hidden_size, eps=config.rms_norm_eps, bias=False)',
                )
                for doc in ("Make the norm before a block.", "Make the last norm.")
            ),
        ),
        "llama-default",
        "model.layers.0.input_layernorm",
        "output",
        "it is a layer norm (mean subtracted), times weight",
    ),
    BrokenModel(
        "epsilon",
        "llama",
        (
            (
                "self.input_layernorm = self.make_norm(config)",
                "self.input_layernorm = RMSNorm(config.hidden_size, eps=1e-5)",
            ),
        ),
        "llama-default",
        "model.layers.0.input_layernorm",
        "output",
        "its epsilon is 1e-05, the reference's 1e-06",
    ),
    BrokenModel(
        "norms' weights in each other's places",
        "llama",
        (
            (
                "    packed_modules_mapping =",
                """    rename = [
        (r"input_layernorm", "other"),
        (r"post_attention_layernorm", "input_layernorm"),
        (r"other", "post_attention_layernorm"),
    ]
    packed_modules_mapping =""",
            ),
        ),
        "llama-default",
        "model.layers.0.input_layernorm",
        "output",
        "it holds the weight of model.layers.0.post_attention_layernorm",
    ),
    BrokenModel(
        "layers in each other's places",
        "llama",
        (
            (
                "    packed_modules_mapping =",
                """    rename = [
        (r"layers.0.self_attn.o_proj", "other"),
        (r"layers.1.self_attn.o_proj", "layers.0.self_attn.o_proj"),
        (r"other", "layers.1.self_attn.o_proj"),
    ]
    packed_modules_mapping =""",
            ),
        ),
        "llama-default",
        f"{ATTENTION}.o_proj",
        "output",
        "it holds the weight of model.layers.1.self_attn.o_proj",
    ),
    BrokenModel(
        "embeddings scaled",
        "llama",
        (
            (
                "else input_embeds\n        residual = None",
                "else input_embeds\n        hidden_states = hidden_states * 48**0.5\n        residual = None",
            ),
        ),
        "llama-default",
        "model.layers.0.input_layernorm",
        "input",
        "times 6.9282",
    ),
    BrokenModel(
        "logits scaled",
        "llama",
        (("LogitsProcessor(config)", "LogitsProcessor(config, logit_scale=0.5)"),),
        "llama-default",
        "lm_head",
        "logits",
        "times 0.5",
    ),
    BrokenModel(
        "the embedding as head",
        "llama",
        (
            (
                "self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)",
                "self.logits_processor(input_ids, hidden_states, self.model.embed_tokens, forward_batch)",
            ),
        ),
        "llama-default",
        "lm_head",
        "logits",
        "the embedding's weights",
    ),
    BrokenModel(
        "no soft cap",
        "gemma2",
        (("logit_cap=config.attn_logit_softcapping or 0.0,", "logit_cap=0.0,"),),
        "Gemma2ForCausalLM",
        ATTENTION,
        "attention output",
        "soft cap of the scores: ours none, the reference's 1.0",
        {"attn_logit_softcapping": 1.0},
    ),
    BrokenModel(
        "query_pre_attn_scalar ignored",
        "gemma2",
        (("scaling=config.query_pre_attn_scalar**-0.5,", "scaling=None,"),),
        "Gemma2ForCausalLM",
        ATTENTION,
        "attention output",
        "attention scaling: ours 0.25, the reference's 0.0625",
    ),
    BrokenModel(
        "weight of the norm not plus one",
        "gemma2",
        (("layers.norm import GemmaRMSNorm", "layers.norm import RMSNorm as GemmaRMSNorm"),),
        "Gemma2ForCausalLM",
        "model.layers.0.input_layernorm",
        "output",
        "it is a root-mean-square norm, times weight",
    ),
    BrokenModel(
        "embedding not scaled",
        "gemma2",
        (("super().forward(input_ids) * self.scale", "super().forward(input_ids)"),),
        "Gemma2ForCausalLM",
        "model.embed_tokens",
        "output",
        "times 0.125",
    ),
    BrokenModel(
        "halves in the place of neighbours",
        "glm4",
        (("is_neox_style=False", "is_neox_style=True"),),
        "Glm4ForCausalLM",
        f"{ATTENTION}.rotary_emb",
        "queries",
        "rotary layout: ours pairs halves",
    ),
    BrokenModel(
        "whole heads rotated",
        "gpt_neox",
        ((", is_partial=True", ""),),
        "GPTNeoXForCausalLM",
        "gpt_neox.layers.0.attention.rotary_emb",
        "queries",
        "rotated components of a head: ours 16, the reference's 4",
    ),
    BrokenModel(
        "blocks one after the other",
        "gpt_neox",
        (("hidden_states if self.use_parallel_residual else attended", "attended"),),
        "GPTNeoXForCausalLM",
        "gpt_neox.layers.0.post_attention_layernorm",
        "input",
        "output of gpt_neox.layers.0.attention is added once more",
    ),
    BrokenModel(
        "residual factor missing",
        "granite",
        (
            (
                "self.self_attn(positions, hidden_states, forward_batch) * self.residual_multiplier",
                "self.self_attn(positions, hidden_states, forward_batch)",
            ),
        ),
        "GraniteForCausalLM",
        "model.layers.0.post_attention_layernorm",
        "input",
        "the reference's is 0.22 (residual_multiplier) * output of model.layers.0.self_attn",
        {"residual_multiplier": 0.22},
    ),
    BrokenModel(
        "no sinks",
        "gpt_oss",
        (("forward_batch, sinks=self.sinks)", "forward_batch)"),),
        "GptOssForCausalLM",
        ATTENTION,
        "attention output",
        "attention sinks: missing in ours",
    ),
    BrokenModel(
        "weights of experts not normalised",
        "qwen2_moe",
        (("renormalize=self.always_renormalizes or config.norm_topk_prob,", "renormalize=False,"),),
        "Qwen2MoeForCausalLM",
        "model.layers.0.mlp.experts",
        "experts' weights",
        "weights of the chosen experts: ours not renormalised",
        {"norm_topk_prob": True},
    ),
)

LANGUAGE_ATTENTION = "model.language_model.layers.0.self_attn"
VISION = "model.visual.blocks.0.attn"

BROKEN_SEEING_MODELS = (
    BrokenModel(
        "scores of patches not scaled",
        "qwen2_vl",
        (
            (
                "            use_qkv_parallel=True,\n",
                "            use_qkv_parallel=True,\n            softmax_scale=1.0,\n",
            ),
        ),
        "qwen2_vl",
        VISION,
        "attention output",
        "attention scaling: ours 1, the reference's 0.353553",
    ),
    BrokenModel(
        "patches without rows and columns",
        "qwen2_vl",
        (("position_embeddings=positions, forward_metadata", "forward_metadata"),),
        "qwen2_vl",
        VISION,
        "attention output",
        "turned by their patches' rows and columns: ours not at all",
    ),
    BrokenModel(
        "learned positions missing",
        "qwen3_vl",
        (("        x = x + self._learned_positions(grids, x.device).to(x.dtype)\n", ""),),
        "qwen3_vl",
        "model.visual.blocks.0.norm1",
        "input",
        "it is what the reference has as output of model.visual.patch_embed",
    ),
    BrokenModel(
        "sections interleaved",
        "qwen2_vl",
        (("interleaved: bool = False", "interleaved: bool = True"),),
        "qwen2_vl",
        f"{LANGUAGE_ATTENTION}.rotary_emb",
        "queries",
        "turn by time, height and width: ours [2, 2, 2] interleaved, the reference's [2, 2, 2] one after another",
    ),
    BrokenModel(
        "other sections",
        "qwen2_vl",
        (("(rope_scaling or {}) | {", '(rope_scaling or {}) | {"mrope_section": [4, 1, 1]} | {'),),
        "qwen2_vl",
        f"{LANGUAGE_ATTENTION}.rotary_emb",
        "queries",
        "ours [4, 1, 1] one after another, the reference's [2, 2, 2] one after another",
    ),
    BrokenModel(
        "height and width exchanged",
        "qwen2_vl",
        (
            (
                "mrope_position_delta = positions,",
                "mrope_position_delta = positions[[0, 2, 1]],",
            ),
        ),
        "qwen2_vl",
        f"{LANGUAGE_ATTENTION}.rotary_emb",
        "queries",
        "(time, height, width)",
    ),
    BrokenModel(
        "no norm before merging",
        "qwen2_vl",
        (("first(self.ln_q(x).view", "first(x.view"),),
        "qwen2_vl",
        "model.visual.merger.mlp.0",
        "input",
        "0 to 47 of output of model.visual.blocks.1; the reference's of rows",
    ),
    BrokenModel(
        "norms of a block exchanged",
        "qwen2_vl",
        (
            ("self.attn(self.norm1(x)", "self.attn(self.norm2(x)"),
            ("self.mlp(self.norm2(x))", "self.mlp(self.norm1(x))"),
        ),
        "qwen2_vl",
        "model.visual.blocks.0.norm2",
        "input",
        "the reference has as input of model.visual.blocks.0.norm1",
    ),
    BrokenModel(
        "features scaled",
        "qwen2_vl",
        (("        return visual(patches,", "        return 2 * visual(patches,"),),
        "qwen2_vl",
        "model.language_model",
        "embeddings of text and media",
        "times 2",
    ),
)
