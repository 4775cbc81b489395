"""How much memory serving a GGUF file takes at most: all processes of the server, from its start on.

What counts is the proportional set size (PSS): a page that several processes share is counted once, and pages of the
file that are mapped are counted, too.
"""

import json
import re
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path

from benchmark.published.models import PublishedModel, short_texts
from benchmark.published.results import Place, Record
from benchmark.published.server import serving

MAX_TOTAL_TOKENS = 4096
TIMES_FILE, OVERHEAD = 1.1, 400e6  # what may be taken: so many times the file, the cache, and so many bytes
CACHE = re.compile(r"([\d.]+) GiB of cache")


def measure(model: PublishedModel, file: Path, folder: Path, place: Place) -> Record:
    """Serve a file, have all prompts answered at once and a long one alone; return the peak."""
    options = ["--device", "cpu", "--max-total-tokens", str(MAX_TOTAL_TOKENS)]
    texts = short_texts()
    with serving(file, options, place.work / "server.log", watched=True) as served:
        generate(served.port, texts)
        generate(served.port, ["\n".join(texts)])
        peak = sum(served.memory.peak.values())
        found = CACHE.search(served.log.read_text())
    if found is None:
        raise RuntimeError(f"the server's log does not tell the size of its cache: {served.log}")
    size, cache = file.stat().st_size, float(found[1]) * 2**30
    return {"file": size, "cache": cache, "peak": peak, "allowed": TIMES_FILE * size + cache + OVERHEAD}


def generate(port: int, texts: list[str]) -> None:
    body = {"text": texts, "sampling_params": {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}}
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {answer.decode(errors='replace')[:500]}")


def table(records: Mapping[str, Record]) -> str:
    """Markdown, of the records of models by their titles."""
    head = f"| | file, MB | cache of {MAX_TOTAL_TOKENS:,} tokens, MB | peak, MB | 1.1 file + cache + 400 MB |"
    lines = [head, "|---|---|---|---|---|"]
    for title, record in records.items():
        cells = [f"{record[name] / 1e6:.0f}" for name in ("file", "cache", "peak", "allowed")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)
