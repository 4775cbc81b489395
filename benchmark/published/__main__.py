"""Published models that anybody can install, run and measured: ``make real``, or

    python -m benchmark.published [SECTION ...]

Sections: files (download only), parity, accuracy, evaluations, memory, embedding, speed; all by default. Each writes
its table into docs/published_models.md. What was measured is kept, so that an interrupted run goes on where it was.
Files lie in RTP_LLM_REAL, or in ~/.cache/rtp_llm/published.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from transformers.utils import logging

from benchmark.peers.peers import DEFAULT_INTO, PEERS
from benchmark.peers.peers import HERE as PEERS_FOLDER
from benchmark.peers.workloads import WORKLOADS
from benchmark.published import accuracy, embedding, evaluations, memory, page, parity, speed
from benchmark.published.files import FilesError, default_folder, installed
from benchmark.published.models import CHAT_OPTIONS, MODELS, PublishedModel
from benchmark.published.reference import ReadingError, reference_folder
from benchmark.published.results import Place, Record, kept

MEASURED: dict[str, Callable[[PublishedModel, Path, Path, Place], Record]] = {
    "parity": parity.measure,
    "accuracy": accuracy.measure,
    "evaluations": evaluations.measure,
    "memory": memory.measure,
}
TABLES = {
    "parity": parity.table,
    "accuracy": accuracy.table,
    "evaluations": evaluations.table,
    "memory": memory.table,
    "embedding": embedding.table,
    "speed": speed.table,
}
FILES, EMBEDDING, SPEED, ALL = "files", embedding.SECTION, speed.SECTION, "all"
SECTIONS = (FILES, "parity", "accuracy", "evaluations", "memory", EMBEDDING, SPEED)
EXIT_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    data = args.data or default_data()
    place = Place(
        args.folder.resolve(),
        args.work_dir.resolve(),
        args.into.resolve(),
        data,
        args.threads,
        args.rounds,
        args.again,
        tuple(args.workloads),
    )
    place.work.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    models = [model for model in MODELS if not args.models or model.stem in args.models]
    try:
        files = {model: installed(model, place.models) for model in models}
        for section in SECTIONS[1:] if ALL in args.sections else [name for name in args.sections if name != FILES]:
            records = records_of(section, files, place)
            table = TABLES[section](records)
            print(f"\n{table}\n", flush=True)
            if args.page is not None:
                page.replace_section(args.page, section, table, records)
    except (FilesError, ReadingError, page.PageError, subprocess.CalledProcessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    for model, file in files.items():
        print(f"{model.title}: {file}\n  rtp-llm chat --model-path {file} {CHAT_OPTIONS}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.published", description="Run and measure published models that anybody can install."
    )
    sections = (*SECTIONS, ALL)
    parser.add_argument("sections", nargs="*", default=[ALL], metavar="SECTION", help=", ".join(sections))
    parser.add_argument("--models", nargs="+", choices=[model.stem for model in MODELS], help="all by default")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where the models' files lie")
    work_dir = PEERS_FOLDER / ".work"
    parser.add_argument("--work-dir", type=Path, default=work_dir, help="results, and what is made on the way")
    parser.add_argument("--into", type=Path, default=DEFAULT_INTO, help="where peers/setup.py put llama.cpp")
    parser.add_argument("--data", type=Path, help="folder with gsm8k/test.jsonl and mmlu; unset: they are downloaded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of the section speed")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="that it measures")
    parser.add_argument("--page", type=Path, default=page.PAGE, help="where the tables are written")
    parser.add_argument("--no-page", action="store_const", const=None, dest="page", help="only print the tables")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(sections):
        parser.error(f"no section {', '.join(sorted(unknown))}; have {', '.join(sections)}")
    return args


def default_data() -> Path | None:
    """Return the folder of evaluations in RTP_LLM_TEST_DATA, if that is there."""
    named = os.environ.get("RTP_LLM_TEST_DATA")
    folder = Path(named, "eval") if named else None
    return folder if folder is not None and folder.is_dir() else None


def records_of(section: str, files: dict[PublishedModel, Path], place: Place) -> dict[str, Record]:
    if section == SPEED:
        return speed_records(files, place)
    return embedding.records(place) if section == EMBEDDING else section_records(section, files, place)


def section_records(section: str, files: dict[PublishedModel, Path], place: Place) -> dict[str, Record]:
    records = {}
    for model, file in files.items():
        folder = reference_folder(model, file, place.references)
        measure = partial(MEASURED[section], model, file, folder, place)
        records[model.title] = kept(place, section, model.stem, measure)
    return records


def speed_records(files: dict[PublishedModel, Path], place: Place) -> dict[str, Record]:
    """Return the records of the published files and of those with random weights. Empty without llama.cpp."""
    if not PEERS["llama.cpp"].python(place.peers).exists():
        raise FilesError("the section speed needs llama.cpp: python benchmark/peers/setup.py llama.cpp")
    titles = {model.title: file for model, file in files.items()} | speed.random_files(place)
    return speed.records(titles, place)


if __name__ == "__main__":
    sys.exit(main())
