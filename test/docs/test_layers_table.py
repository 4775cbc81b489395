"""The page's table of layers lists all that model files are made of, and nothing that is not there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ROOT / "rtp_llm" / "srt" / "layers"
PAGE = ROOT / "docs" / "supported_models" / "layers.md"
ROW = re.compile(r"^\| `(\w+)` \| `([\w.]+)` \| (\S.*\S) \|$")

# What the engine and the layers use among themselves, by module.
NOT_FOR_MODEL_FILES: dict[str, set[str]] = {
    "activation": {"kernel_of"},
    "fused_moe": {"called_by_expert"},
    "linear": {"LinearBase", "OutputShard", "output_shards"},
    "logits_processor": {
        "LaterLogits",
        "Logprobs",
        "LogitsProcessorOutput",
        "pooled_states",
        "prompt_logprobs",
        "token_logprobs",
    },
    "media_encoder": {"MediaEncoder"},
    "moe": {"Experts", "expert_sources"},
    "multimodal": {"Placement", "placements", "rows_within"},
    "norm": {"Norm"},
    "pooled_decoder": {"NoHead", "as_pooled", "as_scorer"},
    "pooler": {"Behind", "last_function"},
    "radix_attention": {"AttentionType"},
    "rope_scaling": {"RopeSpec", "longrope_attention_factor", "longrope_inv_freq", "rope_kind"},
    "rotary": {  # the classes are what get_rope returns
        "DynamicNTKRotaryEmbedding",
        "LengthScaledRotaryEmbedding",
        "LongRopeRotaryEmbedding",
        "MRotaryEmbedding",
        "RotaryEmbedding",
        "rope_lens",
        "share_ropes",
        "split_rope_parameters",
    },
    "rotary_embedding": {"get_rope"},  # that of rotary, in vLLM's form
    "splade": {"Splade"},
    "token_exchange": {"CollectedTokens", "SentTokens", "TokenExchange", "goes_to", "of_all_ranks", "places_of"}
    | {"token_exchange"},
    "towers.clip": {"CLIPEncoder", "CLIPEncoderLayer", "CLIPVisionEmbeddings"},
    "towers.pixtral": {"PixtralAttentionLayer", "PixtralTransformer"},
    "towers.siglip": {"SiglipVisionEmbeddings"},
    "vision": {
        "SegmentGroup",
        "SingletonCache",
        "VisionAttentionMetadata",
        "prepare_vision_attention_metadata",
    },
    "weights": {"declared_sources", "fill", "is_optional", "packed_shard_ids", "shape_of", "swap_part"},
}
ROOMS_OF_THE_ENGINE = ("fallback", "quantization")


def defined(path: Path) -> set[str]:
    """Public classes and functions of a module."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}
    return {name for name in names if not name.startswith("_")}


def modules() -> dict[str, set[str]]:
    found = {}
    for path in sorted(LAYERS.rglob("*.py")):
        parts = path.relative_to(LAYERS).with_suffix("").parts
        if parts[0] not in ROOMS_OF_THE_ENGINE and parts[-1] != "__init__":
            found[".".join(parts)] = defined(path)
    return found


def rows() -> list[tuple[str, str]]:
    first_table = PAGE.read_text().partition("\n|")[2].partition("\n\n")[0]
    lines = first_table.splitlines()[2:]
    matches = [ROW.match(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return [(match[1], match[2]) for match in matches if match]


def test_every_layer_has_a_line() -> None:
    listed = rows()
    assert len(set(listed)) == len(listed) > 50
    wanted = {
        (name, module) for module, names in modules().items() for name in names - NOT_FOR_MODEL_FILES.get(module, set())
    }
    assert set(listed) == wanted


def test_what_is_left_out_is_there() -> None:
    found = modules()
    for module, names in NOT_FOR_MODEL_FILES.items():
        assert names <= found[module], module
