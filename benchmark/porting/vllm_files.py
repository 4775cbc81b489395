"""What vLLM's source says about its model files: which are of text, which architectures they run, what they need.

A model file is a Python file of ``vllm/model_executor/models`` that is not one of the folder's own helpers. It is one
of text if it names neither MULTIMODAL_REGISTRY nor SupportsMultiModal; the others are multimodal.
"""

import ast
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODELS = Path("vllm", "model_executor", "models")
HELPERS = frozenset(
    ("__init__", "adapters", "config", "interfaces", "interfaces_base", "module_mapping", "registry", "utils", "vision")
)
MULTIMODAL = re.compile(r"\b(MULTIMODAL_REGISTRY|SupportsMultiModal)\b")
# The tables of vLLM's registry, by what their models do.
TASKS = {
    "_TEXT_GENERATION_MODELS": "text generation",
    "_SPECULATIVE_DECODING_MODELS": "drafter",
    "_EMBEDDING_MODELS": "pooling",
    "_LATE_INTERACTION_MODELS": "pooling",
    "_REWARD_MODELS": "pooling",
    "_TOKEN_CLASSIFICATION_MODELS": "pooling",
    "_SEQUENCE_CLASSIFICATION_MODELS": "pooling",
    "_MULTIMODAL_MODELS": "multimodal",
}
# What a file's source shows that it needs, which the engine or the rules do not have.
NEEDS = {
    "recurrent layers": re.compile(r"\b(MambaBase|BailingMoELinearAttention|KimiDeltaAttention|causal_conv1d_fn)\b"),
    "latent attention": re.compile(r"\b(MultiHeadLatentAttention\w*|MLAModules|MLAAttention)\b"),
}


class SourceError(ValueError):
    """There is no vLLM source at the given place."""


@dataclass(frozen=True)
class Entry:
    """A line of vLLM's registry: an architecture, its class, and what the table that it stands in is for."""

    architecture: str
    class_name: str
    task: str


@dataclass(frozen=True)
class ModelFile:
    path: Path
    entries: list[Entry]

    @property
    def name(self) -> str:
        return self.path.stem

    def needs(self) -> list[str]:
        """Return what it needs that the engine does not have, of NEEDS."""
        source = self.path.read_text(encoding="utf-8")
        return [need for need, pattern in NEEDS.items() if pattern.search(source)]

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(entry.task for entry in self.entries))


@contextmanager
def unpacked(place: Path) -> Iterator[Path]:
    """Yield the folder that holds ``vllm/``: of a checkout, of an unpacked wheel, or of a wheel, unpacked for a while.

    Raises:
        SourceError: nothing of that kind is there.
    """
    if place.suffix == ".whl":
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(place) as wheel:
            members = [name for name in wheel.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            wheel.extractall(folder, members)
            yield _checked(Path(folder), place)
        return
    yield _checked(next((root for root in (place, place.parent) if (root / MODELS).is_dir()), place), place)


def _checked(root: Path, place: Path) -> Path:
    if not (root / MODELS / "registry.py").is_file():
        raise SourceError(f"{place} has no {MODELS}/registry.py: name a wheel, or a folder with vllm/ in it")
    return root


def version_of(root: Path) -> str:
    """Return vLLM's version as its source says it; the wheel's folder of metadata is not needed."""
    for name in ("_version.py", "version.py"):
        path = root / "vllm" / name
        found = (
            re.search(r"""__version__ = version = ['"]([\w.+]+)['"]""", path.read_text()) if path.is_file() else None
        )
        if found:
            return found[1]
    return "unknown"


def model_files(root: Path) -> list[ModelFile]:
    """Return the text model files, in alphabetical order."""
    entries = read_registry(root)
    files = [path for path in sorted((root / MODELS).glob("*.py")) if path.stem not in HELPERS]
    return [
        ModelFile(path, entries.get(path.stem, []))
        for path in files
        if not MULTIMODAL.search(path.read_text(encoding="utf-8"))
    ]


def multimodal_files(root: Path) -> list[Path]:
    """Return the model files that are not of text, in alphabetical order."""
    of_text = {file.path for file in model_files(root)}
    files = (path for path in sorted((root / MODELS).glob("*.py")) if path.stem not in HELPERS)
    return [path for path in files if path not in of_text]


def count_multimodal(root: Path) -> int:
    return len(multimodal_files(root))


def read_registry(root: Path) -> dict[str, list[Entry]]:
    """Return the registry's lines by module, read from its source without importing it."""
    tree = ast.parse((root / MODELS / "registry.py").read_text(encoding="utf-8"))
    found: dict[str, list[Entry]] = {}
    for statement in tree.body:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict)):
            continue
        task = TASKS.get(ast.unparse(statement.targets[0]))
        for key, value in zip(statement.value.keys, statement.value.values, strict=True):
            if task and isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                module, class_name = (ast.literal_eval(item) for item in value.elts)
                found.setdefault(module, []).append(Entry(str(key.value), class_name, task))
    return found
