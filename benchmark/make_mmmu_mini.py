"""Draws a small data set with the layout of MMMU, and one of MMMU-Pro, so that both run without a download.

python benchmark/make_mmmu_mini.py --output-dir mini
python benchmark/mmmu/bench_rtp_llm.py --dataset-path mini/MMMU
python benchmark/mmmu_pro/bench_rtp_llm.py --dataset-path mini/MMMU_Pro --setting vision

The questions are about shapes, colours, counts and two-digit numbers: they say whether a model sees, and nothing of
what it knows. The same options give the same questions and pixels.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice, zip_longest
from math import cos, pi, sin
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, for the modules beside this one

from PIL import Image, ImageDraw, ImageFont

from benchmark.evaluation import EXIT_ERROR, EvaluationError, positive
from benchmark.mmmu.dataset import LETTERS, MAX_PICTURES, MENTION
from benchmark.mmmu.mmmu import DOMAINS
from benchmark.mmmu_pro.mmmu_pro import FOLDERS

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 140, 44),
    "blue": (31, 80, 200),
    "yellow": (245, 214, 40),
    "orange": (255, 127, 14),
    "purple": (128, 60, 170),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "pink": (250, 150, 190),
    "brown": (120, 72, 30),
}
CORNERS = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6}  # a circle has none
SHAPES = ("circle", *CORNERS)
SIDES = (112, 140, 168)  # of pictures, in pixels
NUM_OPTIONS, NUM_OPTIONS_PRO = 4, 10
TEXTS = ("id", "question", "options", "explanation", "img_type", "answer", "topic_difficulty")
IMAGES = tuple(f"image_{number}" for number in range(1, MAX_PICTURES + 1))

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A question, its pictures, the right answer and wrong ones. ``is_open``: it may be asked without options."""

    question: str
    pictures: Sequence[Image.Image]
    answer: str
    others: Sequence[str]
    is_open: bool = False


# Questions


def about_colour(draw: random.Random) -> Drawn:
    shape, colour = draw.choice(SHAPES), draw.choice(list(COLOURS))
    others = [name for name in COLOURS if name != colour]
    return Drawn(f"Which colour is the {shape} in <image 1>?", [shape_picture(draw, shape, colour)], colour, others)


def about_shape(draw: random.Random) -> Drawn:
    shape, colour = draw.choice(SHAPES), draw.choice(list(COLOURS))
    others = [name for name in SHAPES if name != shape]
    return Drawn("What is drawn in <image 1>?", [shape_picture(draw, shape, colour)], shape, others)


def about_count(draw: random.Random) -> Drawn:
    count, shape = draw.randint(1, 9), draw.choice(SHAPES)
    picture = blank(draw)
    places = draw.sample([(column, row) for column in range(3) for row in range(3)], count)
    cell = picture.width / 3
    for column, row in places:
        paint_shape(picture, shape, draw.choice(list(COLOURS)), cell * (column + 0.5), cell * (row + 0.5), cell * 0.35)
    others = [str(number) for number in range(1, 12) if number != count]
    return Drawn("How many shapes are there in <image 1>?", [picture], str(count), others, is_open=True)


def about_number(draw: random.Random) -> Drawn:
    number = draw.randint(10, 99)
    others = [str(other) for other in draw.sample(range(10, 100), NUM_OPTIONS_PRO) if other != number]
    question = "Which number is written in <image 1>?"
    return Drawn(question, [number_picture(draw, number)], str(number), others, is_open=True)


def about_two(draw: random.Random) -> Drawn:
    first, second = draw.sample(range(10, 100), 2)
    pictures = [number_picture(draw, first), number_picture(draw, second)]
    question = "Of the numbers in <image 1> and <image 2>, which one is larger?"
    more = draw.sample([number for number in range(10, 100) if number not in (first, second)], NUM_OPTIONS_PRO - 2)
    others = [str(min(first, second)), *map(str, more)]
    return Drawn(question, pictures, str(max(first, second)), others, is_open=True)


def about_options(draw: random.Random) -> Drawn:
    """The options are pictures."""
    shapes = draw.sample(SHAPES, NUM_OPTIONS)
    pictures = [shape_picture(draw, shape, draw.choice(list(COLOURS))) for shape in shapes]
    right = draw.randrange(NUM_OPTIONS)
    mentions = [f"<image {number}>" for number in range(1, NUM_OPTIONS + 1)]
    others = [mention for i, mention in enumerate(mentions) if i != right]
    return Drawn(f"Which of the pictures shows a {shapes[right]}?", pictures, mentions[right], others)


KINDS: tuple[Callable[[random.Random], Drawn], ...] = (
    about_colour,
    about_shape,
    about_count,
    about_number,
    about_two,
    about_options,
)


# Pictures


def blank(draw: random.Random) -> Image.Image:
    side = draw.choice(SIDES)
    return Image.new("RGB", (side, side), "white")


def shape_picture(draw: random.Random, shape: str, colour: str) -> Image.Image:
    picture = blank(draw)
    radius = picture.width * draw.uniform(0.2, 0.4)
    x, y = (draw.uniform(radius, picture.width - radius) for _ in range(2))
    paint_shape(picture, shape, colour, x, y, radius)
    return picture


def number_picture(draw: random.Random, number: int) -> Image.Image:
    picture = blank(draw)
    colour = COLOURS[draw.choice([name for name in COLOURS if name not in ("yellow", "pink")])]
    middle = (picture.width / 2, picture.height / 2)
    font = ImageFont.load_default(picture.width // 2)
    ImageDraw.Draw(picture).text(middle, str(number), fill=colour, font=font, anchor="mm")
    return picture


def paint_shape(picture: Image.Image, shape: str, colour: str, x: float, y: float, radius: float) -> None:
    """A filled shape whose corners lie on a circle around (x, y), in pixels; a square stands on its side."""
    canvas, fill = ImageDraw.Draw(picture), COLOURS[colour]
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    corners = CORNERS[shape]
    turn = pi / 4 if shape == "square" else 0
    angles = [2 * pi * i / corners - pi / 2 + turn for i in range(corners)]
    canvas.polygon([(x + radius * cos(angle), y + radius * sin(angle)) for angle in angles], fill=fill)


def whole_question(drawn: Drawn, options: Sequence[str]) -> Image.Image:
    """One picture with the question, its pictures below each other, and the options: for MMMU-Pro's vision setting."""
    question = MENTION.sub("the picture", drawn.question)
    lines = [question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))]
    font, line_height = ImageFont.load_default(16), 24
    width = max(*(int(font.getlength(line)) for line in lines), *(picture.width for picture in drawn.pictures)) + 20
    height = sum(picture.height + 10 for picture in drawn.pictures) + line_height * len(lines) + 20
    page = Image.new("RGB", (width, height), "white")
    canvas, y = ImageDraw.Draw(page), 10
    canvas.text((10, y), lines[0], fill="black", font=font)
    y += line_height
    for picture in drawn.pictures:
        page.paste(picture, (10, y))
        y += picture.height + 10
    for line in lines[1:]:
        canvas.text((10, y), line, fill="black", font=font)
        y += line_height
    return page


# Rows


def options_of(drawn: Drawn, num_options: int, draw: random.Random) -> tuple[list[str], str]:
    """At most so many options in an order that is drawn, and the right one's letter."""
    options = [drawn.answer, *islice(drawn.others, num_options - 1)]
    draw.shuffle(options)
    return options, LETTERS[options.index(drawn.answer)]


def mmmu_row(name: str, drawn: Drawn, draw: random.Random) -> Row:
    is_open = drawn.is_open and draw.random() < 0.5
    options, letter = ([], drawn.answer) if is_open else options_of(drawn, NUM_OPTIONS, draw)
    kind = {"question_type": "open" if is_open else "multiple-choice", "subfield": "Drawn pictures"}
    return _row(name, drawn.question, options, letter) | kind | _numbered(drawn.pictures)


def standard_row(name: str, subject: str, drawn: Drawn, num_options: int, draw: random.Random) -> Row:
    options, letter = options_of(drawn, num_options, draw)
    return _row(name, drawn.question, options, letter) | {"subject": subject} | _numbered(drawn.pictures)


def vision_row(name: str, subject: str, drawn: Drawn, draw: random.Random) -> Row:
    options, letter = options_of(drawn, NUM_OPTIONS_PRO, draw)
    image = _encoded(whole_question(drawn, options))
    return {"id": name, "options": repr(options), "answer": letter, "subject": subject, "image": image}


def _row(name: str, question: str, options: list[str], answer: str) -> Row:
    details = {"explanation": "", "topic_difficulty": "Easy", "img_type": "['Drawings']"}
    return {"id": name, "question": question, "options": repr(options), "answer": answer} | details


def _numbered(pictures: Sequence[Image.Image]) -> Row:
    return dict(zip_longest(IMAGES, map(_encoded, pictures)))


def _encoded(picture: Image.Image) -> Row:
    content = BytesIO()
    picture.save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


# Files


def write_rows(path: Path, rows: Sequence[Row], texts: Sequence[str], images: Sequence[str]) -> None:
    """A parquet file with these columns, marked so that the ``datasets`` library knows its pictures."""
    try:
        import pyarrow as pa  # large, and only for this
        from pyarrow import parquet
    except ImportError:
        raise EvaluationError("pyarrow writes parquet files and is not installed: pip install pyarrow") from None
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [(name, pa.string()) for name in texts] + [(name, image) for name in images]
    features = {name: {"dtype": "string", "_type": "Value"} for name in texts} | {n: {"_type": "Image"} for n in images}
    schema = pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


def write_datasets(folder: Path, num_subjects: int, num_questions: int, seed: int) -> None:
    """Both data sets, with so many subjects, spread over the domains, and so many questions of each."""
    turns = [name for name in chain.from_iterable(zip_longest(*DOMAINS.values())) if name is not None]
    pro: dict[str, list[Row]] = {setting: [] for setting in FOLDERS}
    for subject in sorted(turns[:num_subjects]):
        draw = random.Random(f"{seed}:{subject}")
        drawn = [KINDS[(i + len(subject)) % len(KINDS)](draw) for i in range(num_questions)]
        rows = [mmmu_row(f"validation_{subject}_{i}", one, draw) for i, one in enumerate(drawn, start=1)]
        path = folder / "MMMU" / subject / "validation-00000-of-00001.parquet"
        write_rows(path, rows, (*TEXTS, "question_type", "subfield"), IMAGES)
        for i, one in enumerate(drawn, start=1):
            name = f"test_{subject}_{i}"
            pro["standard-10"].append(standard_row(name, subject, one, NUM_OPTIONS_PRO, draw))
            pro["standard-4"].append(standard_row(name, subject, one, NUM_OPTIONS, draw))
            if len(one.pictures) == 1:  # the mention of an option's picture says nothing within a picture
                pro["vision"].append(vision_row(name, subject, one, draw))
    for setting, rows in pro.items():
        texts = ("id", "options", "answer", "subject") if setting == "vision" else (*TEXTS, "subject")
        path = folder / "MMMU_Pro" / FOLDERS[setting] / "test-00000-of-00001.parquet"
        write_rows(path, rows, texts, ("image",) if setting == "vision" else IMAGES)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw small data sets with the layouts of MMMU and MMMU-Pro.")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets the folders MMMU and MMMU_Pro")
    parser.add_argument("--num-subjects", type=positive, default=6, help="at most 30; unset: 6, one of each domain")
    parser.add_argument("--num-questions", type=positive, default=6, help="of each subject; unset: 6, one of each kind")
    parser.add_argument("--seed", type=int, default=0, help="other questions for another number; unset: 0")
    args = parser.parse_args(argv)
    try:
        write_datasets(args.output_dir, args.num_subjects, args.num_questions, args.seed)
    except (EvaluationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    print(f"{args.output_dir / 'MMMU'} and {args.output_dir / 'MMMU_Pro'} are written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
