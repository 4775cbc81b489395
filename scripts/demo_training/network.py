"""The demo model as it is trained: Qwen2-VL (Wang et al., 2024) written for small batches on one CPU core.

Parameters have the names of Hugging Face's Qwen2VLForConditionalGeneration, so that a state dict of one is a state dict
of the other. What differs is arithmetic that a still picture allows: its two frames are equal, so the patch embedding
is one matrix over one frame (``published`` writes it out as half of it for each), and pictures of one size are attended
to together. Linear layers compute in bfloat16 where the processor multiplies bfloat16 and autocast is on.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLConfig

Grid = tuple[int, int]  # patches of a picture: rows, columns


@dataclass
class Batch:
    """Rows of tokens, padded at the end, and the patches of all pictures in them, in the order of their tokens."""

    ids: Tensor  # [B, L]
    positions: Tensor  # [3, B, L]: time, row, column
    labels: Tensor  # [B, L]: the token itself where it is learned, else IGNORED
    answers: Tensor  # [B, L]: which answer a learned token belongs to, else -1
    skills: list[str]  # of each answer
    patches: Tensor  # [P, 588] of one frame each, float32
    seen: Tensor  # [P / 4, 4]: what has its center in a merged patch: kind, color, third of height and width; or -1
    grids: list[Grid]  # of each picture


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [..., head_dim]`` turned by angles whose cosine and sine are given for half a head."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# ---- what sees


class PatchEmbed(nn.Module):
    """A picture's patch, both frames of it equal: the sum of the two frames' weights, learned as one."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.proj = nn.Linear(vision.in_channels * vision.patch_size**2, vision.embed_dim, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class VisionAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: list[tuple[int, int]]) -> Tensor:
        """Attention within each picture; ``groups`` says how many pictures of how many patches follow each other."""
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed, start = [], 0
        for pictures, size in groups:
            stop = start + pictures * size
            own = [t[start:stop].view(pictures, size, self.num_heads, -1).transpose(1, 2) for t in (q, k, v)]
            mixed.append(attention(*own).transpose(1, 2).reshape(stop - start, -1))
            start = stop
        return self.proj(torch.cat(mixed))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention by plain products, which for rows this short are faster than the fused kernel on a CPU. All of
    it in the dtype of what comes in: autocast would write the scores out in float32."""
    with torch.autocast("cpu", enabled=False):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        return scores.softmax(-1) @ v


class VisionMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionBlock(nn.Module):
    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.norm1 = nn.LayerNorm(vision.embed_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(vision.embed_dim, eps=1e-6)
        self.attn = VisionAttention(vision.embed_dim, vision.num_heads)
        self.mlp = VisionMlp(vision.embed_dim, vision.embed_dim * vision.mlp_ratio)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: list[tuple[int, int]]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, groups)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.merged = vision.embed_dim * vision.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(vision.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.merged, self.merged), nn.GELU(), nn.Linear(self.merged, vision.hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.merged))


class VisionTower(nn.Module):
    """Patches of all pictures to one embedding for every two by two of them."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.merge = vision.spatial_merge_size
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(vision.depth))
        self.merger = PatchMerger(config)
        axis = vision.embed_dim // vision.num_heads // 2
        self.register_buffer("frequencies", 10000.0 ** -(torch.arange(0, axis, 2) / axis), persistent=False)

    def forward(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        """``patches [P, 588]`` of pictures of the grids -> [P / 4, hidden]"""
        places = torch.cat([patch_places(grid, self.merge) for grid in grids])
        angles = (places[:, :, None] * self.frequencies).flatten(1)[:, None]
        groups = [(count, rows * columns) for (rows, columns), count in runs(grids)]
        x = self.patch_embed(patches)
        cos, sin = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, cos, sin, groups)
        return self.merger(x)


def runs(grids: Iterable[Grid]) -> Iterator[tuple[Grid, int]]:
    """Equal grids that follow each other, counted."""
    last, count = None, 0
    for grid in grids:
        if last is not None and grid != last:
            yield last, count
            count = 0
        last, count = grid, count + 1
    if last is not None:
        yield last, count


def patch_places(grid: Grid, merge: int) -> Tensor:
    """[rows * columns, 2]: row and column of each patch, in the order in which neighbours are merged."""
    rows, columns = grid
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
    blocks = places.view(rows // merge, merge, columns // merge, merge, 2)
    return blocks.transpose(1, 2).reshape(-1, 2)


# ---- what speaks


class Attention(nn.Module):
    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        text = config.text_config
        self.num_heads, self.num_kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = text.hidden_size // text.num_attention_heads
        self.q_proj = nn.Linear(text.hidden_size, self.num_heads * self.head_dim)
        self.k_proj = nn.Linear(text.hidden_size, self.num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(text.hidden_size, self.num_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, text.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = rotate(self.q_proj(x).view(rows, length, self.num_heads, -1), cos, sin)
        k = rotate(self.k_proj(x).view(rows, length, self.num_kv_heads, -1), cos, sin)
        v = self.v_proj(x).view(rows, length, self.num_kv_heads, -1)
        shared = self.num_heads // self.num_kv_heads
        k, v = (t.repeat_interleave(shared, dim=2).transpose(1, 2) for t in (k, v))
        mixed = attention(q.transpose(1, 2), k, v, mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


class Mlp(nn.Module):
    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        width, inner = config.text_config.hidden_size, config.text_config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        text = config.text_config
        self.self_attn, self.mlp = Attention(config), Mlp(config)
        self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        text = config.text_config
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        head_dim = text.hidden_size // text.num_attention_heads
        theta, sections = text.rope_parameters["rope_theta"], text.rope_parameters["mrope_section"]
        self.register_buffer("frequencies", theta ** -(torch.arange(0, head_dim, 2) / head_dim), persistent=False)
        self.register_buffer("axis", torch.arange(3).repeat_interleave(torch.tensor(sections)), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x [B, L, hidden]`` at ``positions [3, B, L]`` -> the same; frequency i turns with axis ``axis[i]``."""
        angles = (positions[self.axis].permute(1, 2, 0) * self.frequencies)[:, :, None]
        cos, sin = angles.cos(), angles.sin()
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.image_token_id = config.image_token_id
        self.language_model, self.visual = LanguageModel(config), VisionTower(config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Last hidden states [B, L, hidden], and the embeddings of the pictures' tokens, if there are any."""
        x, seen = self.language_model.embed_tokens(batch.ids), None
        if batch.grids:
            seen = self.visual(batch.patches, batch.grids)
            at = (batch.ids == self.image_token_id).flatten().nonzero()[:, 0]
            x = x.flatten(0, 1).index_copy(0, at, seen.to(x.dtype)).view_as(x)
        return self.language_model(x, batch.positions), seen


class DemoNetwork(nn.Module):
    """The whole: its head is the embedding of the tokens."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Model(config)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)  # each layer starts as the identity, which learns a little faster
            elif parameter.ndim == 2:
                spread = 0.05 if "embed_tokens" in name else parameter.shape[1] ** -0.5
                nn.init.trunc_normal_(parameter, std=spread, a=-3 * spread, b=3 * spread)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.language_model.embed_tokens.weight)

    def queries_and_keys(self) -> Iterator[Tensor]:
        """The matrices that make queries and keys, of what speaks and of what sees; each can be changed in place."""
        for layer in self.model.language_model.layers:
            yield layer.self_attn.q_proj.weight
            yield layer.self_attn.k_proj.weight
        for block in self.model.visual.blocks:
            yield from block.attn.qkv.weight.chunk(3)[:2]

    def published(self) -> dict[str, Tensor]:
        """The state dict of Hugging Face's class."""
        weights = dict(self.state_dict())
        patch = weights.pop("model.visual.patch_embed.proj.weight")
        vision = self.config.vision_config
        side, frames = vision.patch_size, vision.temporal_patch_size
        one = patch.view(-1, vision.in_channels, 1, side, side) / frames
        weights["model.visual.patch_embed.proj.weight"] = one.repeat(1, 1, frames, 1, 1)
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
        return weights
