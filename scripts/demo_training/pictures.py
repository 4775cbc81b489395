"""The pictures that the embedded demo model is asked about: drawn by rules, from a description and a seed.

A picture is things in nine places, or a two-digit number. What it shows is its description; how it is drawn (size of
the picture, shades, background, jitter, outline, lettering) follows from the seed. ``patches`` prepares a picture as
Qwen2-VL's image processor does.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SHADES: dict[str, tuple[tuple[int, int], ...]] = {  # ranges of red, green and blue
    "red": ((200, 255), (0, 50), (0, 50)),
    "green": ((0, 60), (120, 220), (0, 80)),
    "blue": ((0, 60), (0, 110), (170, 255)),
    "yellow": ((230, 255), (210, 255), (0, 70)),
    "orange": ((240, 255), (120, 165), (0, 40)),
    "purple": ((110, 160), (0, 60), (120, 200)),
    "black": ((0, 30), (0, 30), (0, 30)),
    "white": ((235, 255), (235, 255), (235, 255)),
}
COLORS = tuple(SHADES)
BACKGROUNDS = (
    (255, 255, 255), (255, 255, 255), (240, 240, 240), (200, 200, 200), (128, 128, 128), (50, 50, 50), (0, 0, 0),
    (200, 225, 255), (255, 240, 215), (215, 240, 215), (25, 25, 70),
)  # fmt: skip
PLACES = (
    "at the top left", "at the top", "at the top right", "on the left", "in the center", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
CENTER = PLACES.index("in the center")
SIDES = ((1, 1), (1, 1), (1, 1), (5, 4), (4, 5), (4, 3), (3, 4), (3, 2), (2, 3))  # width to height
MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pixels
PATCH, MERGE = 14, 2
MIN_PIXELS, MAX_PIXELS = 112 * 112, 140 * 140
EXTENTS = {  # half the extent of a thing, of the picture's shorter side
    "small": (0.085, 0.11), "medium": (0.09, 0.14), "large": (0.17, 0.22), "any": (0.11, 0.26),
}  # fmt: skip
KINDS = (*SHAPES, *"0123456789")  # what a patch of a picture can be a part of


@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    place: int  # 0..8, row by row
    size: str = "medium"


@dataclass(frozen=True)
class Picture:
    """Things in different places, or a number, or nothing at all."""

    things: tuple[Thing, ...] = ()
    number: int | None = None
    seed: int = 0

    @property
    def key(self) -> str:
        """What it shows, however it is drawn."""
        if self.number is not None:
            return f"number {self.number}"
        listed = (f"{thing.shape} {thing.color} {thing.place} {thing.size}" for thing in self.things)
        return "picture " + ", ".join(sorted(listed))


@dataclass
class Drawn:
    image: Image.Image
    parts: list[tuple[str, str | None, float, float, float]]  # kind, color, center, half extent; of width and height


def draw(picture: Picture) -> Drawn:
    """The picture, and where in it what is."""
    rng = random.Random(picture.seed)
    wide, high = rng.choice(SIDES)
    short = rng.choice((112, 140, 168, rng.randint(100, 400)))
    width, height = round(short * max(1, wide / high)), round(short * max(1, high / wide))
    colors = {thing.color for thing in picture.things}
    if picture.number is not None:
        colors = {rng.choice(COLORS)}
    background = rng.choice(backgrounds(colors))
    image = Image.new("RGB", (width, height), background)
    if picture.number is not None:
        return Drawn(image, draw_number(image, str(picture.number), shade(colors.pop(), rng), rng))
    return Drawn(image, [draw_thing(image, *placed, rng) for placed in arrange(picture.things, image.size, rng)])


def shade(color: str, rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(*bounds) for bounds in SHADES[color])


def backgrounds(colors: Iterable[str]) -> list[tuple[int, int, int]]:
    """Those on which all the colors can be seen."""
    return [ground for ground in BACKGROUNDS if all(in_contrast(color, ground) for color in colors)]


@cache
def in_contrast(color: str, background: tuple[int, int, int]) -> bool:
    """Whether every shade of the color is far from the background."""
    gaps = (max(low - x, x - high, 0) for (low, high), x in zip(SHADES[color], background, strict=True))
    return math.hypot(*gaps) > 90


# ---- things

Placed = tuple[Thing, float, float, float]  # center and half extent in pixels


def arrange(things: tuple[Thing, ...], size: tuple[int, int], rng: random.Random) -> list[Placed]:
    """Each thing near the middle of its place, none over another, all within the picture."""
    width, height = size
    short = min(size)
    while True:
        placed: list[Placed] = []
        for thing in rng.sample(things, len(things)):
            radius = rng.uniform(*EXTENTS[thing.size]) * short
            if thing.size == "any" and thing.place == CENTER:
                radius *= rng.uniform(1, 1.7)
            row, column = divmod(thing.place, 3)
            x = clipped((column + 0.5 + rng.uniform(-0.22, 0.22)) * width / 3, radius, width)
            y = clipped((row + 0.5 + rng.uniform(-0.22, 0.22)) * height / 3, radius, height)
            placed.append((thing, x, y, radius))
        if all(apart(a, b) for i, a in enumerate(placed) for b in placed[:i]) and all(
            is_in_place(thing, x / width, y / height) for thing, x, y, _ in placed
        ):
            return placed


def clipped(center: float, radius: float, extent: int) -> float:
    return min(max(center, radius + 2), extent - radius - 2)


def apart(a: Placed, b: Placed) -> bool:
    return max(abs(a[1] - b[1]), abs(a[2] - b[2])) > a[3] + b[3] + 2


def is_in_place(thing: Thing, x: float, y: float) -> bool:
    row, column = divmod(thing.place, 3)
    return abs(x - (column + 0.5) / 3) < 0.125 and abs(y - (row + 0.5) / 3) < 0.125


def draw_thing(image: Image.Image, thing: Thing, x: float, y: float, radius: float, rng: random.Random) -> tuple:
    color = shade(thing.color, rng)
    pen = ImageDraw.Draw(image)
    points = outline(thing.shape, rng)
    corners = [(x + radius * px, y + radius * py) for px, py in points]
    hollow = thing.shape != "cross" and radius > 0.12 * min(image.size) and rng.random() < 0.2
    if hollow:
        line = max(3, round(radius * rng.uniform(0.16, 0.3)))
        pen.line([*corners, *corners[:2]], fill=color, width=line, joint="curve")
    else:
        pen.polygon(corners, fill=color)
    return thing.shape, thing.color, x / image.width, y / image.height, radius / min(image.size)


def outline(shape: str, rng: random.Random) -> list[tuple[float, float]]:
    """The corners of a shape of extent two around the origin, turned by a few degrees."""
    corners = {
        "circle": regular(40),
        "square": [(-0.87, -0.87), (0.87, -0.87), (0.87, 0.87), (-0.87, 0.87)],
        "triangle": [(0.0, -0.95), (0.98, 0.8), (-0.98, 0.8)],
        "star": [(px * r, py * r) for (px, py), r in zip(regular(10), (1, 0.42) * 5, strict=True)],
        "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
        "cross": plus(rng.uniform(0.2, 0.36)),
    }[shape]
    turn = math.radians(rng.uniform(-8, 8)) if rng.random() < 0.5 else 0.0
    cos, sin = math.cos(turn), math.sin(turn)
    return [(px * cos - py * sin, px * sin + py * cos) for px, py in corners]


def regular(corners: int) -> list[tuple[float, float]]:
    angles = (2 * math.pi * i / corners for i in range(corners))
    return [(math.sin(angle), -math.cos(angle)) for angle in angles]


def plus(arm: float) -> list[tuple[float, float]]:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


# ---- numbers

STROKES = {  # digits as lines in a box of one by two
    "0": [[(0.5, 0), (0.9, 0.2), (1, 1), (0.9, 1.8), (0.5, 2), (0.1, 1.8), (0, 1), (0.1, 0.2), (0.5, 0)]],
    "1": [[(0.15, 0.4), (0.55, 0), (0.55, 2)]],
    "2": [[(0, 0.4), (0.2, 0.05), (0.7, 0), (1, 0.4), (0.9, 0.9), (0, 2), (1, 2)]],
    "3": [[(0, 0.2), (0.5, 0), (0.95, 0.3), (0.8, 0.8), (0.4, 0.95), (0.9, 1.15), (1, 1.6), (0.5, 2), (0, 1.8)]],
    "4": [[(0.75, 2), (0.75, 0), (0, 1.4), (1, 1.4)]],
    "5": [[(0.95, 0), (0.1, 0), (0.05, 0.9), (0.6, 0.8), (1, 1.2), (0.9, 1.8), (0.4, 2), (0, 1.8)]],
    "6": [
        [(0.85, 0.05), (0.3, 0.4), (0, 1.2), (0.1, 1.8), (0.5, 2), (0.95, 1.7), (0.9, 1.1), (0.5, 0.95), (0.05, 1.2)],
    ],
    "7": [[(0, 0), (1, 0), (0.35, 2)]],
    "8": [
        [(0.5, 0.95), (0.1, 0.7), (0.1, 0.2), (0.5, 0), (0.9, 0.2), (0.9, 0.7), (0.5, 0.95)],
        [(0.5, 0.95), (0, 1.3), (0.05, 1.8), (0.5, 2), (0.95, 1.8), (1, 1.3), (0.5, 0.95)],
    ],
    "9": [
        [(0.95, 0.75), (0.5, 1.05), (0.1, 0.9), (0.05, 0.3), (0.5, 0), (0.9, 0.2), (1, 0.8), (0.7, 1.6), (0.15, 1.95)],
    ],
}  # fmt: skip


def draw_number(image: Image.Image, digits: str, color: tuple[int, ...], rng: random.Random) -> list[tuple]:
    """Two digits somewhere, in the lettering that comes with Pillow or in strokes of a pen."""
    width, height = image.size
    size = min(rng.uniform(0.36, 0.85) * height, 0.72 * width)
    mask = lettered(digits, round(size), rng) if rng.random() < 0.7 else penned(digits, size, rng)
    if rng.random() < 0.3:
        mask = mask.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR, expand=True)
    mask = mask.crop(mask.getbbox())
    if mask.width > width - 6 or mask.height > height - 6:
        mask.thumbnail((width - 6, height - 6))
    x, y = rng.randint(3, width - mask.width - 3), rng.randint(3, height - mask.height - 3)
    if rng.random() < 0.5:
        x, y = (width - mask.width) // 2, (height - mask.height) // 2
    image.paste(color, (x, y), mask)
    step = mask.width / len(digits)
    centers = (((x + step * (i + 0.5)) / width, (y + mask.height / 2) / height) for i in range(len(digits)))
    return [(digit, None, cx, cy, step / 2 / min(image.size)) for digit, (cx, cy) in zip(digits, centers, strict=True)]


def lettered(digits: str, size: int, rng: random.Random) -> Image.Image:
    mask = Image.new("L", (2 * size, 2 * size))
    bold = rng.choice((0, 0, 1, 2)) * size // 48
    ImageDraw.Draw(mask).text((size // 4, size // 4), digits, 255, font(size), stroke_width=bold)
    return mask


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def penned(digits: str, size: float, rng: random.Random) -> Image.Image:
    mask = Image.new("L", (round(2 * size), round(2 * size)))
    pen = ImageDraw.Draw(mask)
    line, tall, broad = rng.uniform(0.06, 0.14) * size, 0.36 * size, rng.uniform(0.36, 0.48) * size
    for i, digit in enumerate(digits):
        left = 0.3 * size + i * (broad + line + 0.12 * size)
        for stroke in STROKES[digit]:
            points = [(left + px * broad, 0.3 * size + py * tall) for px, py in stroke]
            pen.line(points, fill=255, width=round(line), joint="curve")
            for x, y in (points[0], points[-1]):
                pen.ellipse((x - line / 2, y - line / 2, x + line / 2, y + line / 2), fill=255)
    return mask


# ---- what the model sees


def fitted(width: int, height: int) -> tuple[int, int]:
    """Width and height in whole pairs of patches, within the limits on pixels, near to the ratio of the sides."""
    side = PATCH * MERGE
    wide, high = round(width / side) * side, round(height / side) * side
    if wide * high > MAX_PIXELS:
        scale = math.sqrt(width * height / MAX_PIXELS)
        wide, high = (max(side, math.floor(x / scale / side) * side) for x in (width, height))
    elif wide * high < MIN_PIXELS:
        scale = math.sqrt(MIN_PIXELS / (width * height))
        wide, high = (math.ceil(x * scale / side) * side for x in (width, height))
    return wide, high


def patches(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """[rows * columns, 588] float32, two by two patches together, and the rows and columns."""
    image = image.resize(fitted(*image.size), Image.Resampling.BICUBIC)
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(MEAN)) / np.float32(SPREAD)
    rows, columns = image.height // PATCH, image.width // PATCH
    cut = pixels.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    return cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1), (rows, columns)


def shown(parts: list[tuple[str, str | None, float, float, float]], grid: tuple[int, int]) -> np.ndarray:
    """[rows * columns / 4, 4]: for each merged patch the kind and the color of what has its center there, and where in
    the picture that is (thirds of height and width); -1 where nothing has, and for the color of a digit."""
    rows, columns = grid[0] // MERGE, grid[1] // MERGE
    table = np.full((rows, columns, 4), -1, np.int64)
    for kind, color, x, y, _ in parts:
        at = min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)
        table[at] = KINDS.index(kind), COLORS.index(color) if color else -1, min(int(y * 3), 2), min(int(x * 3), 2)
    return table.reshape(-1, 4)
