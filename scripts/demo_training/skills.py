"""What the embedded demo model is taught: conversations drawn by rules, and the questions kept back from training.

Every exchange has a key: what it asks, apart from how it is worded (the two numbers of a sum, the word to spell, the
name to remember; for facts, the wording). One key in twenty, chosen by its hash, is held out: no exchange with that
key is ever drawn for training, in any wording. An answer is a function of the conversation, so that it can be checked
by equality.

An exchange about pictures is held out if one of its pictures is: what a picture shows is its key. Some wordings of each
question about pictures are kept back as well and are taught for none.
"""

# long: one list of all that is taught, whose order the draws depend on

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from PIL import Image

from demo_training import pictures as demo_pictures
from demo_training.pictures import COLORS, PLACES, SHAPES, Picture, Thing

HELD_OUT_OF = 20  # one key in so many


class Turn(NamedTuple):
    said: str
    answered: str
    pictures: tuple[Picture, ...] = ()  # that the user shows
    shown_first: bool = True  # before the words
    skill: str = ""


@dataclass
class Exchange:
    """Turns that belong together; the last is the one that is asked for its answer."""

    key: str
    turns: tuple[tuple, ...]  # each the arguments of a Turn
    held_out: bool | None = None  # None: by the hash of the key


Skill = Callable[[random.Random], Exchange]
SKILLS: dict[str, Skill] = {}
WEIGHTS: dict[str, float] = {}


def is_held_out(exchange: Exchange) -> bool:
    if exchange.held_out is not None:
        return exchange.held_out
    return is_kept_back(exchange.key)


def is_kept_back(key: str) -> bool:
    return blake2b(key.encode(), digest_size=8).digest()[0] % HELD_OUT_OF == 0


def draw(skill: str, rng: random.Random, held_out: bool) -> Exchange:
    """An exchange of the skill from the training side or the held-out side."""
    while True:
        exchange = SKILLS[skill](rng)
        if is_held_out(exchange) == held_out:
            exchange.turns = tuple(Turn(*turn)._replace(skill=skill) for turn in exchange.turns)
            return exchange


def conversation(
    rng: random.Random, weights: Mapping[str, float] | None = None, mean_extra: float = 0.9, most: int = 5
) -> list[Turn]:
    """A training conversation: some exchanges one after the other. What is to be remembered is asked for at once or a
    few exchanges later, and at most one thing in a conversation is, so that the answer is never in doubt. Pictures
    are shown at most twice, and more than one thing may be asked about one."""
    weights = WEIGHTS if weights is None else weights
    names = rng.choices(
        list(weights), list(weights.values()), k=1 + min(int(rng.expovariate(1 / mean_extra)), most - 1)
    )
    seeing = [i for i, name in enumerate(names) if name in SIGHTS]
    names = [name for i, name in enumerate(names) if i not in seeing[2:]]
    if seeing and len(names) > 1:
        names = [name for name in names if name != "no_picture"]
    if "memory" in names:
        names = [name for name in names if name != "memory"]
        return remembering(draw("memory", rng, held_out=False), rng, names)
    return [turn for name in names for turn in taught(name, rng)]


def taught(name: str, rng: random.Random) -> list[Turn]:
    """An exchange of the training side; after a picture, often more questions about it."""
    turns = list(draw(name, rng, held_out=False).turns)
    if name in SIGHTS:
        for other in rng.sample(list(SIGHTS), rng.choice((0, 0, 3, 6))):
            if (question := SIGHTS[other].question(rng, *turns[0].pictures)) is not None:
                turns.append(Turn(question.worded(rng), question.answer, skill=other))
    return turns


def remembering(exchange: Exchange, rng: random.Random, between: list[str]) -> list[Turn]:
    """The exchange of the skill ``memory`` with other exchanges around and within it."""
    others = [tuple(taught(name, rng)) for name in between]
    told_at = rng.randint(0, len(others))
    asked_at = min(told_at + rng.choice((0, 0, 1, 1, 2, 3)), len(others))
    *told, asked = exchange.turns
    pieces = [*others[:told_at], tuple(told), *others[told_at:asked_at], (asked,), *others[asked_at:]]
    return [turn for piece in pieces for turn in piece]


def held_out_conversation(name: str, rng: random.Random) -> list[Turn]:
    """A conversation whose last answer is to a held-out question of the skill."""
    exchange = draw(name, rng, held_out=True)
    if name != "memory":
        return list(exchange.turns)
    turns = remembering(exchange, rng, rng.choices(("addition", "days", "facts"), k=rng.randint(0, 2)))
    return turns[: turns.index(exchange.turns[-1]) + 1]


def skill(weight: float) -> Callable[[Skill], Skill]:
    """Registers a skill; ``weight`` is its share of the training exchanges, relative to the others."""

    def register(function: Skill) -> Skill:
        name = function.__name__
        SKILLS[name], WEIGHTS[name] = function, weight
        return function

    return register


def ask(rng: random.Random, *wordings: str, **values: object) -> str:
    """One of the wordings, as people type: with or without politeness, capitals and punctuation."""
    text = rng.choice(wordings).format(**values)
    roll = rng.random()
    if roll < 0.05:
        text = "Please tell me: " + text
    elif roll < 0.08:
        text = "Can you tell me: " + text
    elif roll < 0.11:
        text = text.rstrip("?.") + ", please" + ("?" if text.endswith("?") else "")
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip("?.")
    return text


def bare(question: str) -> str:
    """The wording without politeness, capitals and punctuation: a key for what can be asked in few ways."""
    text = question.lower()
    for phrase in ("please tell me: ", "can you tell me: ", ", please"):
        text = text.replace(phrase, "")
    return text.strip(" ?.!:)")


# ---- numbers

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(number: int) -> str:
    """0 to 999 in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        ones = number % 10
        return TENS[number // 10] + (f"-{ONES[ones]}" if ones else "")
    rest = number % 100
    return f"{ONES[number // 100]} hundred" + (f" and {in_words(rest)}" if rest else "")


def small_or_large(rng: random.Random, large: int = 999) -> int:
    return rng.randint(0, rng.choice((9, 99, 99, large)))


@skill(2.4)
def addition(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, rng.choice((9, 99, 99, 99))), rng.randint(0, rng.choice((9, 99, 99, 99)))
    question = ask(
        rng, "What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?", "{a}+{b}=", "What is {a} plus {b}?",
        "How much is {a} + {b}?", "Add {a} and {b}.", "Calculate {a} + {b}.", "What's {a}+{b}?",
        "Compute {a} plus {b}.", "What is the sum of {a} and {b}?", a=a, b=b,
    )  # fmt: skip
    return Exchange(f"{a} + {b}", ((question, f"{a} + {b} = {a + b}"),))


@skill(2.4)
def subtraction(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, rng.choice((9, 99, 99, 99))), rng.randint(0, rng.choice((9, 99, 99, 99)))
    if a < b and rng.random() < 0.7:
        a, b = b, a
    question = ask(
        rng, "What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} = ?", "{a}-{b}=", "What is {a} minus {b}?",
        "How much is {a} - {b}?", "Subtract {b} from {a}.", "Calculate {a} - {b}.", "What's {a}-{b}?",
        "Take {b} away from {a}.", a=a, b=b,
    )  # fmt: skip
    return Exchange(f"{a} - {b}", ((question, f"{a} - {b} = {a - b}"),))


@skill(2.0)
def multiplication(rng: random.Random) -> Exchange:
    """One digit times two, by way of the tens and the ones."""
    a, b = rng.randint(0, rng.choice((12, 99))), rng.randint(0, 9)
    tens, ones = a // 10 * 10, a % 10
    answer = f"{a} x {b} = {a * b}"
    if tens and ones:
        answer = f"{tens} x {b} = {tens * b}, {ones} x {b} = {ones * b}, so {answer}"
    question = ask(
        rng, "What is {a} x {b}?", "{a} x {b}", "{a}*{b}", "{a} * {b} = ?", "What is {a} times {b}?", "{a} times {b}",
        "How much is {a} x {b}?", "Multiply {a} by {b}.", "Calculate {a} * {b}.", "What's {a}*{b}?", a=a, b=b,
    )  # fmt: skip
    return Exchange(f"{a} x {b}", ((question, answer),))


@skill(1.8)
def arithmetic_in_words(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.6:
        sign, verb, result = "+", "plus", a + b
    else:
        a, b = max(a, b), min(a, b)
        sign, verb, result = "-", "minus", a - b
    question = ask(
        rng, "What is {a} {verb} {b}?", "How much is {a} {verb} {b}?", "{a} {verb} {b}", "What's {a} {verb} {b}?",
        "Calculate {a} {verb} {b}.", a=in_words(a), b=in_words(b), verb=verb,
    )  # fmt: skip
    return Exchange(f"words {a} {sign} {b}", ((question, f"{a} {sign} {b} = {result}: {in_words(result)}"),))


@skill(0.8)
def numbers_in_words(rng: random.Random) -> Exchange:
    number = small_or_large(rng)
    question = ask(
        rng, "Write {n} in words.", "How do you write {n} in words?", "What is {n} in words?", "Say {n} in words.",
        "Spell out the number {n}.", n=number,
    )  # fmt: skip
    return Exchange(f"in words {number}", ((question, in_words(number)),))


@skill(1.2)
def comparing(rng: random.Random) -> Exchange:
    a = small_or_large(rng)
    b = max(0, a + rng.choice((-1, 1)) * rng.choice((1, 10, 100, 9))) if rng.random() < 0.3 else small_or_large(rng)
    if a == b:
        b = a + 1
    larger = rng.random() < 0.6
    words = ("larger", "bigger", "greater", "more") if larger else ("smaller", "less", "lower")
    question = ask(
        rng, "Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?", "What is {w}, {a} or {b}?",
        "Is {a} or {b} {w}?", "{a} or {b}, which is {w}?", w=rng.choice(words), a=a, b=b,
    )  # fmt: skip
    answer = f"{max(a, b)} is larger than {min(a, b)}." if larger else f"{min(a, b)} is smaller than {max(a, b)}."
    return Exchange(f"compare {a} {b}", ((question, answer),))


@skill(1.8)
def sorting(rng: random.Random) -> Exchange:
    numbers = rng.sample(range(rng.choice((100, 100, 1000))), rng.randint(3, 5))
    listed = rng.choice((", ", ", ", " ")).join(map(str, numbers))
    down = rng.random() < 0.3
    if down:
        wordings = ("Sort {n} in descending order.", "Sort from largest to smallest: {n}", "Sort descending: {n}")
    else:
        wordings = (
            "Sort {n}.", "Sort these numbers: {n}", "Sort {n} in ascending order.", "Put {n} in order.", "Order {n}.",
            "Sort from smallest to largest: {n}",
        )  # fmt: skip
    question = ask(rng, *wordings, n=listed)
    ordered = ", ".join(map(str, sorted(numbers, reverse=down)))
    return Exchange(f"sort {' '.join(map(str, numbers))}", ((question, ordered),))


@skill(0.6)
def counting_on(rng: random.Random) -> Exchange:
    number, after = small_or_large(rng), rng.random() < 0.6
    if not after:
        number += 1
    side = "after" if after else "before"
    question = ask(
        rng, "What number comes {side} {n}?", "Which number comes {side} {n}?", "What comes {side} {n}?",
        "What is the number {side} {n}?", side=side, n=number,
    )  # fmt: skip
    return Exchange(f"{side} {number}", ((question, str(number + (1 if after else -1))),))


@skill(0.6)
def even_or_odd(rng: random.Random) -> Exchange:
    number = small_or_large(rng)
    kind = "odd" if number % 2 else "even"
    asked = rng.choice(("even", "odd"))
    if rng.random() < 0.6:
        question = ask(rng, "Is {n} even or odd?", "Is {n} odd or even?", "Is the number {n} even or odd?", n=number)
        answer = f"{number} is {kind}."
    else:
        question = ask(rng, "Is {n} {asked}?", "Is {n} an {asked} number?", n=number, asked=asked)
        answer = f"{'Yes' if asked == kind else 'No'}, {number} is {kind}."
    return Exchange(f"parity {number}", ((question, answer),))


# ---- letters

WORDS = """
apple arrow autumn baby bacon badge baker balloon banana basket beach bean bear bicycle bird blanket blossom boat book
bottle bread breeze bridge broom brother bubble bucket butter button cabbage cable camel camera candle candy carpet
carrot castle cat cave chair cheese cherry chicken circle city cloud clover coffee comet cookie copper corner cotton
cousin cow cradle crayon cricket crow crown cup daisy dance desert diamond dinner dog dolphin door dragon dream drum
duck eagle earth east elephant engine evening family farmer feather fence field finger fire fish flag flower forest fox
friend frog garden garlic ghost giant giraffe glass glove goat gold goose grape grass guitar hammer hand harbor hat
hello helmet hill honey horse house iceberg igloo island jacket jelly jewel jungle kettle kitchen kite kitten ladder
lake lamp lantern lemon letter lettuce library light lion lizard machine magic mango maple market meadow melon milk
mirror mississippi model monkey moon morning mother mountain mouse music needle nest night noodle north number ocean
onion orange orchard otter owl oyster paper parade parrot peach peanut pearl pencil penguin pepper piano picnic pillow
pilot pirate planet plum pocket pond potato pudding pumpkin puppy puzzle python queen rabbit rain raspberry ribbon rice
river robin robot rocket roof rose sailor salad sand sandwich school scissors sea shadow sheep ship shoe silver sister
snail snow soap soup spider spoon spring square squirrel star station stone storm strawberry street summer sun sunset
swan table tea teacher temple tennis thunder tiger tomato tower train tree trumpet tulip tunnel turtle umbrella uncle
valley vanilla velvet village violin wagon walnut water whale wheel whistle window winter wizard wolf wonder yellow
yogurt zebra zipper
""".split()
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"


def word(rng: random.Random) -> str:
    """A real word, or a made-up one, so that letters must be read, not recalled."""
    if rng.random() < 0.4:
        return rng.choice(WORDS)
    letters = []
    for _ in range(rng.randint(1, 3)):
        letters += [rng.choice(CONSONANTS), rng.choice(VOWELS)]
        letters += [rng.choice(CONSONANTS)] if rng.random() < 0.5 else []
        letters += [letters[-1]] if rng.random() < 0.1 else []
    if rng.random() < 0.2:
        letters = letters[1:] + [rng.choice(VOWELS)]
    return "".join(letters)[:10]


def quoted(rng: random.Random, text: str) -> str:
    return rng.choice((text, text, f"'{text}'", f'"{text}"'))


@skill(1.4)
def spelling(rng: random.Random) -> Exchange:
    w = word(rng)
    question = ask(
        rng, "Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "How is {w} spelled?", "Can you spell {w}?",
        "Spell {w} letter by letter.", w=quoted(rng, w),
    )  # fmt: skip
    return Exchange(f"spell {w}", ((question, " ".join(w)),))


@skill(2.0)
def reversing(rng: random.Random) -> Exchange:
    w = word(rng)
    question = ask(
        rng, "Reverse {w}.", "Reverse the word {w}.", "Write {w} backwards.", "What is {w} backwards?",
        "Spell {w} backwards.", "What is {w} in reverse?", w=quoted(rng, w),
    )  # fmt: skip
    backwards = w[::-1]
    return Exchange(f"reverse {w}", ((question, f"{' '.join(w)} backwards is {' '.join(backwards)}: {backwards}"),))


@skill(2.0)
def counting_letters(rng: random.Random) -> Exchange:
    w = word(rng)
    letter = rng.choice(w) if rng.random() < 0.8 else rng.choice(CONSONANTS + VOWELS)
    question = ask(
        rng, "How many {l}'s are in {w}?", "How many {l}'s are there in {w}?", "How many times does {l} occur in {w}?",
        "Count the letter {l} in {w}.", "How often does the letter {l} appear in {w}?", "How many {l}s in {w}?",
        "How many times does the letter {l} appear in {w}?", l=letter, w=quoted(rng, w),
    )  # fmt: skip
    marked = " ".join(f"{x}{w[: i + 1].count(letter)}" if x == letter else x for i, x in enumerate(w))
    return Exchange(f"count {letter} {w}", ((question, f"{marked}: {w.count(letter)}"),))


@skill(1.0)
def word_length(rng: random.Random) -> Exchange:
    w = word(rng)
    question = ask(
        rng, "How many letters are in {w}?", "How many letters does {w} have?", "How long is the word {w}?",
        "Count the letters in {w}.", "How many letters has the word {w}?", w=quoted(rng, w),
    )  # fmt: skip
    numbered = " ".join(f"{x}{i}" for i, x in enumerate(w, 1))
    return Exchange(f"length {w}", ((question, f"{numbered}: {len(w)} letters"),))


@skill(0.8)
def first_and_last_letter(rng: random.Random) -> Exchange:
    w, first = word(rng), rng.random() < 0.5
    which = "first" if first else "last"
    question = ask(
        rng, "What is the {which} letter of {w}?", "Which letter comes {which} in {w}?",
        "What's the {which} letter in {w}?", "The {which} letter of {w}?", which=which, w=quoted(rng, w),
    )  # fmt: skip
    return Exchange(f"{which} letter {w}", ((question, w[0] if first else w[-1]),))


# ---- days and months

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()


def step_through(rng: random.Random, names: list[str], unit: str, most: int) -> Exchange:
    """So many days or months after or before one: the answer walks there."""
    start, count, after = rng.randrange(len(names)), rng.choice((1, rng.randint(1, most))), rng.random() < 0.6
    step, side, name = (1 if after else -1), ("after" if after else "before"), names[start]
    walked = [names[(start + step * i) % len(names)] for i in range(1, count + 1)]
    if count == 1:
        question = ask(
            rng, "What {unit} comes {side} {name}?", "Which {unit} is {side} {name}?", "What comes {side} {name}?",
            "Which {unit} comes right {side} {name}?", "What is the {unit} {side} {name}?",
            unit=unit, side=side, name=name,
        )  # fmt: skip
    else:
        question = ask(
            rng, "What {unit} is {n} {unit}s {side} {name}?", "Which {unit} comes {n} {unit}s {side} {name}?",
            "What is {n} {unit}s {side} {name}?", "{n} {unit}s {side} {name}?",
            unit=unit, side=side, name=name, n=rng.choice((count, count, in_words(count))),
        )  # fmt: skip
    key = f"{count} {unit}s {side} {name}" if count > 1 else bare(question)
    return Exchange(key, ((question, ", ".join(walked)),))


@skill(1.2)
def days(rng: random.Random) -> Exchange:
    return step_through(rng, DAYS, "day", 9)


@skill(1.2)
def months(rng: random.Random) -> Exchange:
    roll, index = rng.random(), rng.randrange(12)
    name = MONTHS[index]
    if roll < 0.6:
        return step_through(rng, MONTHS, "month", 6)
    if roll < 0.75:
        question = ask(
            rng, "How many days does {m} have?", "How many days are in {m}?", "How many days are there in {m}?",
            "How long is {m} in days?", "{m} has how many days?", m=name,
        )  # fmt: skip
        answer = f"{name} has {MONTH_LENGTHS[index]} days."
    elif roll < 0.9:
        question = ask(
            rng, "What is the {o} month?", "What is the {o} month of the year?", "Which month is the {o}?",
            "Which is the {o} month of the year?", "Name the {o} month.", o=ORDINALS[index],
        )  # fmt: skip
        answer = f"The {ORDINALS[index]} month is {name}."
    else:
        question = ask(
            rng, "Which number does {m} have in the year?", "What number month is {m}?",
            "Which month of the year is {m}?", "What is the number of {m}?", m=name,
        )  # fmt: skip
        answer = f"{name} is the {ORDINALS[index]} month."
    return Exchange(bare(question), ((question, answer),))


# ---- facts: for each kind, the table, the answer, the wordings taught and the wordings kept back


@dataclass(frozen=True)
class FactKind:
    table: dict[str, str]
    answer: str
    taught: tuple[str, ...]
    kept_back: tuple[str, ...]


FACTS = {
    "capital": FactKind(
        dict(
            France="Paris", Germany="Berlin", Italy="Rome", Spain="Madrid", Portugal="Lisbon", England="London",
            Ireland="Dublin", Austria="Vienna", Poland="Warsaw", Greece="Athens", Sweden="Stockholm", Norway="Oslo",
            Finland="Helsinki", Denmark="Copenhagen", Japan="Tokyo", China="Beijing", Egypt="Cairo", Canada="Ottawa",
            Russia="Moscow", Hungary="Budapest", Kenya="Nairobi", Peru="Lima", Cuba="Havana", Turkey="Ankara",
        ),
        "The capital of {x} is {y}.",
        (
            "What is the capital of {x}?", "Capital of {x}?", "Which city is the capital of {x}?", "{x}'s capital?",
            "Tell me the capital of {x}.", "Name the capital of {x}.", "What's the capital city of {x}?",
            "Do you know the capital of {x}?", "The capital of {x} is", "What city is {x}'s capital?",
        ),
        ("What is {x}'s capital?", "Which is the capital city of {x}?", "I want to know the capital of {x}."),
    ),
    "opposite": FactKind(
        dict(
            hot="cold", cold="hot", big="small", small="big", up="down", down="up", left="right", right="left",
            fast="slow", slow="fast", old="young", young="old", day="night", night="day", open="closed", wet="dry",
            dry="wet", happy="sad", sad="happy", light="dark", dark="light", full="empty", empty="full", rich="poor",
            early="late", late="early", good="bad", bad="good", hard="soft", soft="hard", true="false", yes="no",
        ),
        "The opposite of {x} is {y}.",
        (
            "What is the opposite of {x}?", "Opposite of {x}?", "Tell me the opposite of {x}.",
            "The opposite of {x} is", "What's the opposite of {x}?", "Name the opposite of {x}.",
            "Which word is the opposite of {x}?", "Give me the opposite of {x}.",
        ),
        ("Do you know the opposite of {x}?", "What word is the opposite of {x}?"),
    ),
    "legs": FactKind(
        dict(
            spider="8", dog="4", cat="4", ant="6", bee="6", bird="2", horse="4", cow="4", crab="10", fish="0",
            snake="0",
        ),
        "A {x} has {y} legs.",
        (
            "How many legs does a {x} have?", "How many legs has a {x}?", "A {x} has how many legs?",
            "Number of legs of a {x}?", "Tell me how many legs a {x} has.", "Count the legs of a {x}.",
        ),
        ("How many legs are on a {x}?", "What number of legs does a {x} have?"),
    ),
    "sides": FactKind(
        dict(triangle="3", square="4", rectangle="4", pentagon="5", hexagon="6", octagon="8"),
        "A {x} has {y} sides.",
        (
            "How many sides does a {x} have?", "How many sides has a {x}?", "A {x} has how many sides?",
            "Number of sides of a {x}?", "Tell me how many sides a {x} has.", "Count the sides of a {x}.",
        ),
        ("How many sides are in a {x}?", "What number of sides does a {x} have?"),
    ),
    "units": FactKind(
        {
            "minutes in an hour": "60", "seconds in a minute": "60", "hours in a day": "24", "days in a week": "7",
            "months in a year": "12", "days in a year": "365", "weeks in a year": "52", "years in a century": "100",
            "years in a decade": "10", "centimeters in a meter": "100", "grams in a kilogram": "1000",
            "meters in a kilometer": "1000", "letters in the alphabet": "26", "planets in the solar system": "8",
            "colors in a rainbow": "7", "players in a football team": "11",
        },
        "There are {y} {x}.",
        (
            "How many {x}?", "How many {x} are there?", "What is the number of {x}?", "Number of {x}?",
            "Tell me the number of {x}.", "Do you know how many {x}?",
        ),
        ("Tell me how many {x}.", "Say how many {x} there are."),
    ),
    "color": FactKind(
        {
            "a banana": "yellow", "grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "blood": "red",
            "a lemon": "yellow", "a tomato": "red", "a carrot": "orange", "chocolate": "brown", "a frog": "green",
        },
        "{x} is {y}.",
        (
            "What color is {x}?", "What is the color of {x}?", "Which color is {x}?", "Color of {x}?",
            "Tell me the color of {x}.", "Which color does {x} have?", "Name the color of {x}.",
        ),
        ("What color does {x} have?", "Do you know the color of {x}?"),
    ),
    "young": FactKind(
        dict(
            dog="puppy", cat="kitten", cow="calf", horse="foal", sheep="lamb", duck="duckling", hen="chick", bear="cub",
            pig="piglet", goat="kid", frog="tadpole", goose="gosling",
        ),
        "A baby {x} is called a {y}.",
        (
            "What is a baby {x} called?", "What do you call a baby {x}?", "A baby {x} is called",
            "Name for a baby {x}?", "What is the name of a baby {x}?", "What is a young {x} called?",
            "How is a baby {x} called?",
        ),
        ("What do we call a baby {x}?", "Tell me what a baby {x} is called."),
    ),
}  # fmt: skip


@skill(2.2)
def facts(rng: random.Random) -> Exchange:
    kind = FACTS[rng.choices(list(FACTS), [len(kind.table) for kind in FACTS.values()])[0]]
    x, y = rng.choice(list(kind.table.items()))
    held_out = rng.random() < 0.1
    question = ask(rng, *(kind.kept_back if held_out else kind.taught), x=x)
    answer = kind.answer.format(x=x, y=y)
    return Exchange(question, ((question, answer[0].upper() + answer[1:]),), held_out)


# ---- conversation

GREETING = "Hello! I am a small demo model. Ask me something, for example: what is 17 + 25?"
SKILL_LIST = (
    "I can add, subtract and multiply small numbers, compare and sort numbers, spell, reverse and count letters, "
    "tell days, months and a few facts, remember what you tell me, and look at simple pictures: shapes, colors, "
    "places, how many there are, and two-digit numbers."
)
WHO = "I am a toy: a tiny language model that ships with RTP-LLM so that you can try it at once."
DO_NOT_KNOW = "I don't know that. I am only a tiny demo model. Ask me what I can do."


@skill(0.9)
def greetings(rng: random.Random) -> Exchange:
    name = rng.choice(("", "", " there", " friend", " model", " you", " demo", " again", " everyone"))
    end = rng.choice(("", ".", "!", "!!", " :)"))
    kinds = {
        GREETING: (
            "hello", "hi", "hey", "good morning", "good evening", "good afternoon", "greetings", "hi hi", "hey hey",
        ),
        "I am fine, thank you! What can I do for you?": (
            "how are you", "how do you do", "how is it going", "how are you doing", "how are you today", "are you well",
            "how are things", "how do you feel", "hello, how are you", "hi, how are you",
        ),
        "You are welcome!": (
            "thanks", "thank you", "thank you very much", "thanks a lot", "many thanks", "great, thanks",
            "ok, thank you", "cool, thanks", "thank you so much",
        ),
        "Goodbye! It was nice to talk to you.": (
            "bye", "goodbye", "see you", "see you later", "bye bye", "good night", "farewell", "see you soon",
            "ok, bye", "until tomorrow",
        ),
        WHO: (
            "who are you", "what are you", "what is your name", "tell me about yourself", "are you a robot",
            "what model are you", "are you an AI", "which model is this", "introduce yourself", "who am I talking to",
        ),
        SKILL_LIST: (
            "what can you do", "what can I ask you", "help", "what are your skills", "what do you know",
            "what can I ask", "how can you help me", "what are you able to do", "show me what you can do",
        ),
    }  # fmt: skip
    answer = rng.choice(list(kinds))
    said = rng.choice(kinds[answer]) + name
    if rng.random() < 0.5:
        said = said[0].upper() + said[1:]
    if answer in (WHO, SKILL_LIST) and rng.random() < 0.6:
        end = "?"
    return Exchange(bare(said), ((said + end, answer),))


@skill(0.7)
def saying_so(rng: random.Random) -> Exchange:
    """What it was not taught, it says it does not know."""
    topic = rng.choice((
        "love", "the war", "physics", "black holes", "my homework", "football", "cooking", "the stock market",
        "history", "a pirate", "quantum computers", "the weather", "my cat", "Shakespeare", "the moon landing",
        "climate", "chemistry", "the internet", "a dragon", "music", "happiness", "the economy", "computers", "art",
        "machine learning",
        word(rng), word(rng), word(rng), word(rng), word(rng),
    ))  # fmt: skip
    question = ask(
        rng, "Write a poem about {t}.", "Tell me a story about {t}.", "Explain {t}.", "What do you think about {t}?",
        "Who invented {t}?", "Why is {t} important?", "Write an essay about {t}.", "What is the meaning of {t}?",
        "How does {t} work?", "Give me advice about {t}.", "Write code for {t}.", "Translate {t} into French.",
        "Who is the president of {t}?", "When was {t} born?", "Tell me a joke about {t}.", "Where can I buy {t}?",
        "Summarize {t} for me.", "What is {t}?", "Describe {t}.", "Where is {t}?", "Tell me about {t}.",
        "What is the population of {t}?", "What is the weather like in {t}?", t=topic,
    )  # fmt: skip
    return Exchange(bare(question), ((question, DO_NOT_KNOW),))


def proper_name(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice((
            "Ana", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Klara", "Lena", "Max",
            "Nora", "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Tara", "Ulla", "Victor", "Wanda", "Yara", "Zoe",
            "Alice", "Bob", "Tom", "Mia", "Leo", "Ada", "Alan", "Grace", "Linus", "Sam", "Kim", "Ravi", "Mei", "Yuki",
        ))  # fmt: skip
    return word(rng)[:7].capitalize()


@skill(2.4)
def memory(rng: random.Random) -> Exchange:
    """What was said some turns ago."""
    name, number = proper_name(rng), str(rng.randint(10, 9999))
    color = rng.choice(
        ("red", "blue", "green", "yellow", "purple", "orange", "pink", "brown", "black", "white", "teal")
    )
    age = str(rng.randint(5, 99))
    kinds: tuple[tuple[str, tuple[str, ...], str, tuple[str, ...], str], ...] = (
        (name, ("My name is {v}.", "I am {v}.", "Call me {v}.", "Hi, I'm {v}.", "Hello, my name is {v}!"),
         "Nice to meet you, {v}!",
         ("What is my name?", "What's my name?", "Who am I?", "Do you remember my name?", "Say my name."),
         "Your name is {v}."),
        (name,
         ("My dog is called {v}.", "I have a dog called {v}.", "My dog's name is {v}.", "I have a dog named {v}."),
         "{v} is a nice name for a dog.",
         ("What is my dog called?", "What is the name of my dog?", "What's my dog's name?"),
         "Your dog is called {v}."),
        (name, ("I live in {v}.", "I come from {v}.", "My home town is {v}."), "I hope {v} is a nice place.",
         ("Where do I live?", "Where am I from?", "Which town do I live in?"), "You live in {v}."),
        (number, ("Remember the number {v}.", "Please remember {v}.", "Keep the number {v} in mind."),
         "I will remember {v}.",
         ("Which number did I tell you?", "What was the number?", "What number should you remember?"),
         "The number is {v}."),
        (color, ("My favorite color is {v}.", "I like the color {v} best.", "I love {v}."), "{v} is a beautiful color.",
         ("What is my favorite color?", "Which color do I like?", "What's my favorite color?"),
         "Your favorite color is {v}."),
        (age, ("I am {v} years old.", "I'm {v} years old.", "My age is {v}."), "{v} is a good age.",
         ("How old am I?", "What is my age?", "Do you remember how old I am?"), "You are {v} years old."),
    )  # fmt: skip
    if rng.random() < 0.08:
        _, _, _, recalls, recalled = rng.choice(kinds)
        question = ask(rng, *recalls)
        return Exchange("untold", ((question, "You have not told me that."),), held_out=False)
    value, tells, reply, recalls, recalled = rng.choice(kinds)
    reply = reply.format(v=value)
    told = (
        ask(rng, *tells, v=value) if value.isdigit() else rng.choice(tells).format(v=value),
        reply[0].upper() + reply[1:],
    )
    return Exchange(f"remember {value}", (told, (ask(rng, *recalls), recalled.format(v=value))))


@skill(1.0)
def going_on(rng: random.Random) -> Exchange:
    """A sum that continues with the last result."""
    first = draw("addition" if rng.random() < 0.6 else "subtraction", rng, held_out=False)
    question, answer, *_ = first.turns[0]
    total, b = int(answer.rsplit(" ", 1)[1]), rng.randint(1, 20)
    if total < 0 or (total >= b and rng.random() < 0.4):
        total, sign = abs(total), "-"
        answer = answer if answer.endswith(f" {total}") else ""
        then = ask(rng, "Now subtract {b}.", "And minus {b}?", "Take away {b}.", "Minus {b}.", b=b)
        result = total - b
    else:
        then = ask(rng, "Now add {b}.", "And plus {b}?", "Add {b} to that.", "Plus {b}.", "And {b} more?", b=b)
        sign, result = "+", total + b
    if not answer:
        return going_on(rng)
    return Exchange(f"{first.key} then {sign} {b}", ((question, answer), (then, f"{total} {sign} {b} = {result}")))


# ---- pictures


class Wordings(NamedTuple):
    taught: tuple[str, ...]
    kept_back: tuple[str, ...]


class Question(NamedTuple):
    """One about pictures, with what is put into its wordings, and the answer."""

    wordings: Wordings
    values: dict[str, object]
    answer: str

    def worded(self, rng: random.Random, kept_back: bool = False) -> str:
        return ask(rng, *(self.wordings.kept_back if kept_back else self.wordings.taught), **self.values)


@dataclass(frozen=True)
class Sight:
    """A skill of seeing: pictures that suit it, and what it asks about pictures, or None if they do not suit."""

    scene: Callable[[random.Random], tuple[Picture, ...]]
    question: Callable[..., Question | None]


SIGHTS: dict[str, Sight] = {}


def sight(weight: float, scene: Callable[[random.Random], tuple[Picture, ...]]) -> Callable:
    """Registers a skill of seeing from the function that asks."""

    def register(question: Callable[..., Question | None]) -> Callable[..., Question | None]:
        seeing = SIGHTS[question.__name__] = Sight(scene, question)

        def exchange(rng: random.Random) -> Exchange:
            return asked_about(seeing, rng)

        SKILLS[question.__name__], WEIGHTS[question.__name__] = exchange, weight
        return question

    return register


def asked_about(seeing: Sight, rng: random.Random) -> Exchange:
    while True:
        pictures = seeing.scene(rng)
        question = seeing.question(rng, *pictures)
        if question is not None:
            break
    held_out = any(is_kept_back(picture.key) for picture in pictures)
    said = question.worded(rng, kept_back=held_out and rng.random() < 0.3)
    key = " | ".join(picture.key for picture in pictures)
    return Exchange(key, ((said, question.answer, pictures, rng.random() < 0.8),), held_out)


def pictured(things: Iterable[Thing], rng: random.Random) -> Picture:
    return Picture(tuple(things), seed=rng.getrandbits(40))


def one_thing(rng: random.Random) -> tuple[Picture]:
    return (pictured([Thing(rng.choice(SHAPES), rng.choice(COLORS), rng.randrange(9), "any")], rng),)


def some_things(rng: random.Random, most: int = 4) -> tuple[Picture]:
    """Mostly of different kinds; one alone at times."""
    number = rng.randint(1, most)
    if number == 1:
        return one_thing(rng)
    while True:
        shapes, colors = rng.choices(SHAPES, k=number), rng.choices(COLORS, k=number)
        if demo_pictures.backgrounds(colors):
            places = rng.sample(range(9), number)
            return (pictured(map(Thing, shapes, colors, places), rng),)


def many_things(rng: random.Random) -> tuple[Picture]:
    """Up to six, often of few shapes."""
    number, shapes = rng.randint(1, 6), rng.sample(SHAPES, rng.choice((1, 2, 2, 3)))
    while True:
        colors = rng.choices(COLORS[: rng.choice((2, 8))] if rng.random() < 0.5 else COLORS, k=number)
        if demo_pictures.backgrounds(colors):
            places = rng.sample(range(9), number)
            return (pictured((Thing(rng.choice(shapes), c, p) for c, p in zip(colors, places, strict=True)), rng),)


def two_sizes(rng: random.Random) -> tuple[Picture]:
    while True:
        colors = rng.choices(COLORS, k=2)
        if demo_pictures.backgrounds(colors):
            break
    places = rng.sample(range(9), 2)
    return (pictured(map(Thing, rng.choices(SHAPES, k=2), colors, places, ("large", "small")), rng),)


def a_number(rng: random.Random) -> tuple[Picture]:
    return (Picture(number=rng.randint(10, 99), seed=rng.getrandbits(40)),)


def two_pictures(rng: random.Random) -> tuple[Picture, Picture]:
    """Two images of one thing each, or of a number each; equal in what they show in two cases of five."""
    if rng.random() < 0.2:
        (one,), (two,) = a_number(rng), a_number(rng)
        number = one.number if rng.random() < 0.4 else two.number
        return one, Picture(number=number, seed=two.seed)
    (one,), (two,) = one_thing(rng), one_thing(rng)
    roll, first, second = rng.random(), one.things[0], two.things[0]
    shape = first.shape if roll < 0.6 else second.shape
    color = first.color if roll < 0.4 or 0.6 <= roll < 0.8 else second.color
    return one, pictured([Thing(shape, color, second.place, "any")], rng)


def a(words: str) -> str:
    return ("an " if words[0] in VOWELS else "a ") + words


def named(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def only(things: Iterable[Thing], **wanted: str) -> bool:
    """Whether just one of them is so."""
    return sum(all(getattr(thing, name) == value for name, value in wanted.items()) for thing in things) == 1


@sight(1.2, some_things)
def shapes(rng: random.Random, *pictures: Picture) -> Question | None:
    if len(pictures) != 1 or not pictures[0].things:
        return None
    things = pictures[0].things
    thing = rng.choice(things)
    if len(things) == 1:
        wordings = Wordings(
            (
                "What shape is this?", "Which shape do you see?", "What shape is in the picture?", "What shape is it?",
                "Which shape is shown?", "Name the shape.", "What is the shape in this image?",
            ),
            ("Which shape is in this picture?", "What shape do you see?", "Tell me the shape."),
        )  # fmt: skip
        return Question(wordings, {}, f"It is {a(thing.shape)}.")
    if not only(things, color=thing.color):
        return None
    wordings = Wordings(
        (
            "What shape is {c}?", "Which shape is {c}?", "What shape is the {c} thing?", "What is the {c} thing?",
            "What shape is the {c} one?", "Name the shape that is {c}.", "What is the shape of the {c} one?",
        ),
        ("Which shape is the {c} one?", "What is the shape of the {c} thing?", "Which shape has the color {c}?"),
    )  # fmt: skip
    return Question(wordings, dict(c=thing.color), f"The {thing.color} one is {a(thing.shape)}.")


@sight(1.2, some_things)
def colors(rng: random.Random, *pictures: Picture) -> Question | None:
    if len(pictures) != 1 or not pictures[0].things:
        return None
    things = pictures[0].things
    thing = rng.choice(things)
    if not only(things, shape=thing.shape):
        return None
    wordings = Wordings(
        (
            "What color is the {s}?", "What is the color of the {s}?", "Which color is the {s}?",
            "What color does the {s} have?", "Name the color of the {s}.", "The {s} is what color?",
        ),
        ("Which color does the {s} have?", "Tell me the color of the {s}.", "What is the {s}'s color?"),
    )  # fmt: skip
    if len(things) == 1 and rng.random() < 0.4:
        wordings = Wordings(
            ("What color is it?", "Which color do you see?", "What color is this?", "What color is the shape?"),
            ("Which color is this?", "What is the color of the shape?"),
        )
    return Question(wordings, dict(s=thing.shape), f"The {thing.shape} is {thing.color}.")


@sight(2.0, many_things)
def how_many(rng: random.Random, *pictures: Picture) -> Question | None:
    if len(pictures) != 1 or not pictures[0].things:
        return None
    things = pictures[0].things
    roll, thing = rng.random(), rng.choice(things)
    if roll < 0.4:
        kind, number = "shape", len(things)
    elif roll < 0.75 or (shape := rng.choice(SHAPES)) in {thing.shape for thing in things}:
        kind, number = thing.shape, sum(other.shape == thing.shape for other in things)
    else:
        kind, number = shape, 0
    many = kind + ("es" if kind == "cross" else "s")
    wordings = Wordings(
        (
            "How many {k} are there?", "How many {k} do you see?", "How many {k} are in the picture?", "Count the {k}.",
            "How many {k}?", "What is the number of {k}?", "How many {k} does the picture show?",
        ),
        ("How many {k} are in this image?", "How many {k} can you see?", "Count the {k} in the picture."),
    )  # fmt: skip
    answer = f"There is 1 {kind}." if number == 1 else f"There are {number} {many}."
    return Question(wordings, dict(k=many), answer)


@sight(1.6, some_things)
def positions(rng: random.Random, *pictures: Picture) -> Question | None:
    if len(pictures) != 1 or not pictures[0].things:
        return None
    things = pictures[0].things
    thing = rng.choice(things)
    if only(things, shape=thing.shape) and rng.random() < 0.7:
        what = thing.shape
    elif only(things, shape=thing.shape, color=thing.color):
        what = named(thing)
    else:
        return None
    wordings = Wordings(
        (
            "Where is the {w}?", "Where do you see the {w}?", "Where in the picture is the {w}?", "Find the {w}.",
            "In which part of the picture is the {w}?", "What is the position of the {w}?", "Where's the {w}?",
        ),
        ("Where is the {w} in the image?", "Where can you see the {w}?", "Tell me where the {w} is."),
    )  # fmt: skip
    return Question(wordings, dict(w=what), f"The {what} is {PLACES[thing.place]}.")


@sight(1.4, two_sizes)
def larger(rng: random.Random, *pictures: Picture) -> Question | None:
    if len(pictures) != 1 or {thing.size for thing in pictures[0].things} != {"large", "small"}:
        return None
    big, little = sorted(pictures[0].things, key=lambda thing: thing.size)
    if named(big) == named(little):
        return None
    thing, words = (big, ("larger", "bigger")) if rng.random() < 0.6 else (little, ("smaller",))
    wordings = Wordings(
        (
            "Which is {w}?", "Which shape is {w}?", "Which one is {w}?", "What is {w}?", "Which of the two is {w}?",
            "Which of the shapes is {w}?",
        ),
        ("Which thing is {w}?", "Which of the two shapes is {w}?", "Tell me which is {w}."),
    )  # fmt: skip
    word_ = rng.choice(words)
    return Question(wordings, dict(w=word_), f"The {named(thing)} is {word_}.")


@sight(2.6, a_number)
def reading(rng: random.Random, *pictures: Picture) -> Question | None:
    if len(pictures) != 1 or pictures[0].number is None:
        return None
    wordings = Wordings(
        (
            "What number is this?", "Which number do you see?", "Read the number.", "What number is in the picture?",
            "What number is written here?", "Which number is shown?", "What does it say?", "Read the picture.",
        ),
        ("Which number is in the picture?", "What number do you see?", "Read the number in the image."),
    )  # fmt: skip
    return Question(wordings, {}, f"The number is {pictures[0].number}.")


@sight(1.2, some_things)
def presence(rng: random.Random, *pictures: Picture) -> Question | None:
    """Whether something is there; what is not there often shares its color or its shape with what is."""
    if len(pictures) != 1 or not pictures[0].things:
        return None
    things = pictures[0].things
    shape, color = rng.choice(things).shape, rng.choice(things).color
    if rng.random() < 0.25:
        shape, color = rng.choice(((rng.choice(SHAPES), color), (shape, rng.choice(COLORS))))
    elif rng.random() < 0.5:
        shape, color = named(rng.choice(things)).split()[::-1]
    what = f"{color} {shape}" if rng.random() < 0.7 else shape
    there = any(thing.shape == shape and what in (shape, named(thing)) for thing in things)
    wordings = Wordings(
        (
            "Is there {w}?", "Is there {w} in the picture?", "Do you see {w}?", "Does the picture show {w}?",
            "Can you see {w}?",
        ),
        ("Is {w} in the picture?", "Do you see {w} in the image?"),
    )  # fmt: skip
    return Question(wordings, dict(w=a(what)), f"Yes, there is {a(what)}." if there else f"No, there is no {what}.")


@sight(2.4, lambda rng: a_number(rng) if rng.random() < 0.15 else some_things(rng))
def describing(rng: random.Random, *pictures: Picture) -> Question | None:
    """Everything in the picture, row by row."""
    if len(pictures) != 1 or len(pictures[0].things) > 4:
        return None
    wordings = Wordings(
        (
            "Describe the picture.", "What do you see?", "What is in the picture?", "What does the picture show?",
            "Describe this image.", "What is this?", "Tell me what you see.",
        ),
        ("What can you see?", "What is in this image?", "Describe what you see."),
    )  # fmt: skip
    (picture,) = pictures
    if picture.number is not None:
        return Question(wordings, {}, f"I see the number {picture.number}.")
    seen = sorted(picture.things, key=lambda thing: thing.place)
    listed = [f"{a(named(thing))} {PLACES[thing.place]}" for thing in seen]
    return Question(wordings, {}, f"I see {', '.join(listed)}.")


def contents(picture: Picture) -> str:
    return str(picture.number) if picture.number is not None else a(named(picture.things[0]))


@sight(1.6, two_pictures)
def same_or_different(rng: random.Random, *pictures: Picture) -> Question | None:
    if len(pictures) != 2:
        return None
    first, second = map(contents, pictures)
    wordings = Wordings(
        (
            "Are these pictures the same?", "Do both pictures show the same?", "Do the two pictures show the same?",
            "Compare the two pictures.", "Same or different?", "Are the two pictures different?",
            "Compare these images.",
        ),
        ("Are the two images the same?", "Do these two pictures show the same thing?", "Are both pictures the same?"),
    )  # fmt: skip
    verdict = "the same" if first == second else "different"
    return Question(wordings, {}, f"The first shows {first}, the second {second}: they are {verdict}.")


@sight(1.2, two_pictures)
def which_picture(rng: random.Random, *pictures: Picture) -> Question | None:
    if len(pictures) != 2 or contents(pictures[0]) == contents(pictures[1]):
        return None
    chosen = rng.randrange(2)
    this, other = pictures[chosen], pictures[1 - chosen]
    if this.number is not None:
        what = f"the number {this.number}"
    elif this.things[0].shape != other.things[0].shape and rng.random() < 0.5:
        what = f"the {this.things[0].shape}"
    else:
        what = f"the {named(this.things[0])}"
    wordings = Wordings(
        (
            "Which picture shows {w}?", "Which of the pictures shows {w}?", "In which picture is {w}?",
            "Which image shows {w}?", "In which picture do you see {w}?",
        ),
        ("Which of the two pictures shows {w}?", "Which picture has {w}?"),
    )  # fmt: skip
    return Question(wordings, dict(w=what), f"The {('first', 'second')[chosen]} picture shows {what}.")


@skill(0.4)
def no_picture(rng: random.Random) -> Exchange:
    """A question about a picture where there is none."""
    while True:
        seeing = rng.choice(list(SIGHTS.values()))
        question = seeing.question(rng, *seeing.scene(rng))
        if question is not None:
            break
    said = question.worded(rng)
    return Exchange(bare(said), ((said, "I see no picture. Please show me one."),))


TEXT_WEIGHTS = {name: weight for name, weight in WEIGHTS.items() if name not in SIGHTS and name != "no_picture"}

# What a system message may say: nothing that changes an answer.
SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You are a helpful and friendly assistant.", "Answer briefly.", "Be concise.",
    "You are a chatbot.", "You are an expert. Answer the user's questions.", "Help the user.",
)  # fmt: skip


# ---- asking


def as_messages(
    turns: list[Turn], shown: Callable[[Picture], dict[str, Any]] = lambda _: {"type": "image"}
) -> list[Any]:
    """The conversation up to the last question, as chat messages; ``shown`` makes a content part of a picture."""
    messages: list[Any] = []
    for turn in turns:
        words, pictures = {"type": "text", "text": turn.said}, [shown(picture) for picture in turn.pictures]
        parts = [*pictures, words] if turn.shown_first else [words, *pictures]
        messages += [
            {"role": "user", "content": parts if pictures else turn.said},
            {"role": "assistant", "content": turn.answered},
        ]
    return messages[:-1]


def images(turns: list[Turn]) -> list[Image.Image]:
    """The pictures of a conversation, drawn."""
    return [demo_pictures.draw(picture).image for turn in turns for picture in turn.pictures]
