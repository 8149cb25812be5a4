"""Procedural image-text samples: small pictures with questions whose answers are known exactly.

Nothing is downloaded and no font of the machine is used: letters come from the 5x7 dot matrix below. A scene is a pure
function of its integer seed, so training, calibration and test sets are kept apart by keeping their seeds apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from PIL import Image, ImageDraw

TASKS: Final = ("shape", "colour", "where", "count", "word", "number", "code", "bars", "describe", "cell")

TRAIN_SEEDS: Final = range(100_000_000)
CALIBRATION_SEEDS: Final = range(200_000_000, 201_000_000)
TEST_SEEDS: Final = range(300_000_000, 301_000_000)

CELL: Final = 16
COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 35, 35),
    "green": (40, 160, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 215, 30),
    "orange": (245, 135, 20),
    "purple": (140, 50, 185),
    "cyan": (40, 200, 215),
    "black": (20, 20, 20),
}
SHAPES: Final = ("circle", "square", "triangle", "diamond", "cross", "ring", "star")
_WORD_LIST: Final = (
    "ANT APE ARM ART BAG BAT BED BEE BIG BOX BOY BUS CAR CAT COW CUP DAY DOG EAR EGG EYE FAN FOX FUN GAS HAT HEN ICE "
    "INK JAM JAR JOB KEY KID LEG LIP MAN MAP MUD NET NUT OAK OIL OWL PEN PIG POT RAT RED ROW RUG SEA SKY SUN TEA TOY "
    "VAN WAX WEB ZOO BABY BALL BARN BEAR BELL BIRD BLUE BOAT BOOK BOOT CAKE CAMP CARD CITY COAT COLD CORN CRAB DARK "
    "DEER DESK DOOR DUCK DUST EAST FARM FISH FIVE FLAG FOOT FORK FOUR FROG GAME GATE GIFT GOAT GOLD GRAY HAND HARP "
    "HILL HOME IRON JUMP KING KITE LAKE LAMP LEAF LION LOVE MILK MOON NEST NINE NOSE OVEN PARK PLUM POND QUIZ RAIN "
    "RICE RING ROAD ROCK ROOF ROSE SALT SAND SHIP SHOE SNOW SOAP SOCK STAR TAXI TENT TOWN TREE WAVE WIND WOLF WOOD "
    "YARD YELL ZERO ZINC"
)
WORDS: Final = tuple(_WORD_LIST.split())
# One 5x7 glyph per character: seven rows, two hexadecimal digits each, the highest of five bits leftmost.
GLYPHS: Final[dict[str, str]] = {
    "0": "0E11131519110E", "1": "040C040404040E", "2": "0E11010204081F", "3": "1F02040201110E",
    "4": "02060A121F0202", "5": "1F101E0101110E", "6": "0608101E11110E", "7": "1F010204080808",
    "8": "0E11110E11110E", "9": "0E11110F01020C", "A": "0E11111F111111", "B": "1E11111E11111E",
    "C": "0E11101010110E", "D": "1C12111111121C", "E": "1F10101E10101F", "F": "1F10101E101010",
    "G": "0E11101711110F", "H": "1111111F111111", "I": "0E04040404040E", "J": "0702020202120C",
    "K": "11121418141211", "L": "1010101010101F", "M": "111B1515111111", "N": "11111915131111",
    "O": "0E11111111110E", "P": "1E11111E101010", "Q": "0E11111115120D", "R": "1E11111E141211",
    "S": "0F10100E01011E", "T": "1F040404040404", "U": "1111111111110E", "V": "11111111110A04",
    "W": "1111111515150A", "X": "11110A040A1111", "Y": "1111110A040404", "Z": "1F01020408101F",
}  # fmt: skip
LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS: Final = "0123456789"

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Question:
    """One question about a picture with its only right answer."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """A picture (RGB, sides multiples of 32 pixels) and every question asked about it."""

    image: Image.Image
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Sample:
    """One image-text pair."""

    image: Image.Image
    question: str
    answer: str
    task: str


@dataclass(frozen=True)
class Mix:
    """How often each kind of scene is drawn, and how hard some of them are.

    Attributes:
        shapes: weight of one to three large shapes; the other weights likewise.
        counting: small shapes to be counted.
        text: words, numbers and codes.
        grid: letters scattered over cells.
        bars: bar charts.
        several_texts: whether words, numbers and codes also share a picture.
        dark_ground: share of text pictures in light ink on a dark ground.
        distractors: whether a second kind of shape stands between those to be counted.
    """

    shapes: int = 30
    counting: int = 20
    text: int = 32
    grid: int = 8
    bars: int = 10
    several_texts: bool = False
    dark_ground: float = 0.0
    distractors: bool = False


PLAIN_MIX: Final = Mix()


def samples(seed: int, count: int, tasks: Collection[str] = TASKS) -> Iterator[Sample]:
    """Yield `count` samples of the given tasks from the scenes `seed`, `seed + 1` and so on.

    Raises:
        ValueError: a task is unknown or none is given.
    """
    unknown = set(tasks) - set(TASKS)
    if unknown or not tasks:
        raise ValueError(f"unknown tasks {sorted(unknown)}; choose one or more of {', '.join(TASKS)}")
    left = count
    while left > 0:
        picture = scene(seed)
        seed += 1
        for question in picture.questions:
            if question.task in tasks and left > 0:
                left -= 1
                yield Sample(picture.image, question.text, question.answer, question.task)


def scene(seed: int, mix: Mix = PLAIN_MIX) -> Scene:
    """Draw the scene of this seed."""
    rng = Random(seed)
    makers = (shapes_scene, counting_scene, text_scene, letter_grid_scene, bars_scene)
    maker = rng.choices(makers, weights=(mix.shapes, mix.counting, mix.text, mix.grid, mix.bars))[0]
    return maker(rng, mix)


def shapes_scene(rng: Random, mix: Mix) -> Scene:
    """One to three large shapes, each in its own quadrant (or half, in a picture of 64x32 or 32x64)."""
    del mix
    columns, rows = rng.choices(((2, 2), (2, 1), (1, 2)), weights=(8, 1, 1))[0]
    places = [(column, row) for row in range(rows) for column in range(columns)]
    chosen = sorted(rng.sample(range(len(places)), rng.randint(1, min(3, len(places)))))
    kinds = rng.sample(SHAPES, len(chosen))
    colours = rng.sample(list(COLOURS), len(chosen))
    image = _canvas(rng, 32 * columns, 32 * rows)
    draw = ImageDraw.Draw(image)
    names = []
    for place, kind, colour in zip(chosen, kinds, colours, strict=True):
        column, row = places[place]
        radius = rng.randint(9, 13)
        reach = 15 - radius
        centre = (32 * column + 16 + rng.randint(-reach, reach), 32 * row + 16 + rng.randint(-reach, reach))
        _draw_shape(draw, kind, centre, radius, _tint(rng, COLOURS[colour]))
        names.append(_place_name(column, row, columns, rows))
    return Scene(image, tuple(_shape_questions(rng, kinds, colours, names)))


def _place_name(column: int, row: int, columns: int, rows: int) -> str:
    vertical = ("top", "bottom")[row] if rows > 1 else ""
    horizontal = ("left", "right")[column] if columns > 1 else ""
    return f"{vertical} {horizontal}".strip()


def _shape_questions(rng: Random, kinds: list[str], colours: list[str], names: list[str]) -> Iterator[Question]:
    parts = [f"a {c} {k} at the {n}" for k, c, n in zip(kinds, colours, names, strict=True)]
    ask = rng.choice(("Describe the image.", "What is in the image?"))
    yield Question("describe", ask, ", ".join(parts))
    picks = list(range(len(kinds)))
    rng.shuffle(picks)
    for pick in picks[:2]:
        yield Question("colour", f"What colour is the {kinds[pick]}?", colours[pick])
        yield Question("shape", f"What shape is {colours[pick]}?", kinds[pick])
        yield Question("where", f"Where is the {colours[pick]} {kinds[pick]}?", names[pick])


def counting_scene(rng: Random, mix: Mix) -> Scene:
    """One to six small shapes, and up to three of another kind among them, one per cell of 16 pixels."""
    kinds = rng.sample(SHAPES, 2)
    counts = [rng.randint(1, 6), rng.randint(0, 3)]
    if not mix.distractors:
        kinds, counts = kinds[:1], counts[:1]
    cells = rng.sample(range(16), sum(counts))
    image = _canvas(rng, 64, 64)
    draw = ImageDraw.Draw(image)
    for index, cell in enumerate(cells):
        kind = kinds[0] if index < counts[0] else kinds[1]
        centre = (CELL * (cell % 4) + 8 + rng.randint(-1, 1), CELL * (cell // 4) + 8 + rng.randint(-1, 1))
        _draw_shape(draw, kind, centre, rng.randint(5, 6), _tint(rng, COLOURS[rng.choice(list(COLOURS))]))
    asked = [Question("count", f"How many {_plural(k)} are there?", str(n)) for k, n in zip(kinds, counts, strict=True)]
    asked.append(Question("count", "How many shapes are there?", str(sum(counts))))
    rng.shuffle(asked)
    return Scene(image, tuple(asked))


def _plural(kind: str) -> str:
    return f"{kind}es" if kind == "cross" else f"{kind}s"


def text_scene(rng: Random, mix: Mix) -> Scene:
    """A word, a number or a code (letters mixed with digits), or several of them, one character per cell."""
    rows = rng.choices((4, 2), weights=(4, 1))[0]
    kinds = rng.sample(("word", "number", "code"), rng.choices((1, 2, 3), weights=(5, 3, 2))[0] if rows == 4 else 1)
    if not mix.several_texts:
        kinds = kinds[:1]
    texts = {kind: _text(rng, kind, 8 if len(kinds) == 1 else 4) for kind in kinds}
    grid = [" "] * (4 * rows)
    heights = {kind: math.ceil(len(text) / 4) for kind, text in texts.items()}
    free = sorted(rng.sample(range(rows - max(heights.values()) + 1), len(kinds)))
    rng.shuffle(kinds)
    for kind, row in zip(kinds, free, strict=True):
        text = texts[kind]
        start = 4 * row + (rng.randint(0, 4 - len(text)) if len(text) < 4 else 0)
        grid[start : start + len(text)] = text
    asked = [Question(kind, rng.choice(_READ[kind]), texts[kind]) for kind in kinds]
    return Scene(_draw_grid(rng, grid, mix), (*asked, *_cell_questions(rng, grid, 1)))


_READ: Final = {
    "word": ("What word is written?", "Read the word."),
    "number": ("What number is shown?", "Read the number."),
    "code": ("What is the code?", "Read the code."),
}


def _text(rng: Random, kind: str, limit: int) -> str:
    if kind == "word":
        return rng.choice(WORDS)
    if kind == "number":
        length = rng.randint(2, min(limit, 6))
        return str(rng.randint(10 ** (length - 1), 10**length - 1))
    mixed = [rng.choice(LETTERS), rng.choice(DIGITS)]
    mixed += [rng.choice(LETTERS + DIGITS) for _ in range(rng.randint(3, limit) - 2)]
    rng.shuffle(mixed)
    return "".join(mixed)


def letter_grid_scene(rng: Random, mix: Mix) -> Scene:
    """Letters and digits scattered over the cells, asked for by row and column."""
    cells = 16 if rng.random() < 0.8 else 8
    filled = set(rng.sample(range(cells), rng.randint(cells // 4, cells)))
    grid = [rng.choice(LETTERS + DIGITS) if cell in filled else " " for cell in range(cells)]
    return Scene(_draw_grid(rng, grid, mix), tuple(_cell_questions(rng, grid, 4)))


def _cell_questions(rng: Random, grid: list[str], limit: int) -> Iterator[Question]:
    filled = [index for index, text in enumerate(grid) if text != " "]
    for index in rng.sample(filled, min(limit, len(filled))):
        yield Question("cell", f"What is in row {index // 4 + 1}, column {index % 4 + 1}?", grid[index])


def _draw_grid(rng: Random, grid: list[str], mix: Mix) -> Image.Image:
    """Draw one character per 16-pixel cell, four cells to a row, in one ink on a contrasting ground."""
    image = _canvas(rng, 64, CELL * (len(grid) // 4))
    ink: Colour = (rng.randint(0, 110), rng.randint(0, 110), rng.randint(0, 110))
    if rng.random() < mix.dark_ground:
        image.paste(ink, (0, 0, *image.size))
        ink = (rng.randint(220, 255), rng.randint(220, 255), rng.randint(220, 255))
    draw = ImageDraw.Draw(image)
    shift = (rng.randint(2, 4), rng.randint(0, 2))
    for index, text in enumerate(grid):
        if text != " ":
            corner = (CELL * (index % 4) + shift[0], CELL * (index // 4) + shift[1])
            _draw_glyph(draw, text, corner, ink)
    return image


def bars_scene(rng: Random, mix: Mix) -> Scene:
    """A bar chart of two to four coloured bars with different heights of one to seven units (8 pixels each)."""
    del mix
    count = rng.randint(2, 4)
    columns = sorted(rng.sample(range(4), count))
    heights = rng.sample(range(1, 8), count)
    colours = rng.sample(list(COLOURS), count)
    image = _canvas(rng, 64, 64)
    draw = ImageDraw.Draw(image)
    inset = rng.randint(1, 4)
    for column, height, colour in zip(columns, heights, colours, strict=True):
        box = (CELL * column + inset, 64 - 8 * height, CELL * column + 15 - inset, 63)
        draw.rectangle(box, fill=_tint(rng, COLOURS[colour]))
    asked = [
        Question("bars", "Which bar is the tallest?", colours[heights.index(max(heights))]),
        Question("bars", "Which bar is the shortest?", colours[heights.index(min(heights))]),
    ]
    for pick in rng.sample(range(count), 2):
        asked.append(Question("bars", f"How tall is the {colours[pick]} bar?", str(heights[pick])))
    rng.shuffle(asked)
    return Scene(image, tuple(asked))


def _canvas(rng: Random, width: int, height: int) -> Image.Image:
    ground = (rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255))
    return Image.new("RGB", (width, height), ground)


def _tint(rng: Random, colour: Colour) -> Colour:
    red, green, blue = (min(255, max(0, channel + rng.randint(-12, 12))) for channel in colour)
    return red, green, blue


def _draw_glyph(draw: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], ink: Colour) -> None:
    """Draw one character, each dot of its 5x7 matrix as 2x2 pixels."""
    left, top = corner
    rows = bytes.fromhex(GLYPHS[text])
    for y, bits in enumerate(rows):
        for x in range(5):
            if bits >> (4 - x) & 1:
                draw.rectangle((left + 2 * x, top + 2 * y, left + 2 * x + 1, top + 2 * y + 1), fill=ink)


def _draw_shape(draw: ImageDraw.ImageDraw, kind: str, centre: tuple[int, int], radius: int, fill: Colour) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        draw.ellipse(box, fill=fill)
    elif kind == "ring":
        draw.ellipse(box, outline=fill, width=max(2, radius // 3))
    elif kind == "square":
        inner = round(radius * 0.85)
        draw.rectangle((x - inner, y - inner, x + inner, y + inner), fill=fill)
    elif kind == "cross":
        arm = max(1, radius // 4)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    else:
        draw.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _OUTLINES[kind]()], fill=fill)


def _star() -> list[tuple[float, float]]:
    turns = [math.pi * (step / 5 - 0.5) for step in range(10)]
    reach = [1.0 if step % 2 == 0 else 0.42 for step in range(10)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(reach, turns, strict=True)]


_OUTLINES: Final[dict[str, Callable[[], list[tuple[float, float]]]]] = {
    "triangle": lambda: [(0, -1), (1, 0.9), (-1, 0.9)],
    "diamond": lambda: [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "star": _star,
}
