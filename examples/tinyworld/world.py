"""The drawn world: pictures of things before scenes, with captions, drawn with Pillow. No model is in here.

Because every picture is drawn, the truth about it is known: its class, colour, pattern and scene. Run as a program,
it writes the photos of the subjects (`subjects/`) that the demo personalizes the tiny model with.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageChops, ImageDraw


SIZE = 64  # pixels, width and height of a picture
_SCALE = 2  # drawn at twice the size and averaged down: smooth edges
_CANVAS = SIZE * _SCALE

CLASSES = ("ball", "box", "star", "heart", "house", "fish", "mug", "boat")
COLOURS = {
    "red": (214, 32, 38),
    "orange": (250, 136, 16),
    "yellow": (248, 222, 40),
    "green": (36, 150, 56),
    "blue": (36, 82, 214),
    "purple": (132, 46, 170),
    "pink": (250, 140, 190),
    "grey": (134, 136, 142),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
# Drawn but never named in a caption: what subjects are made of, so that the base is able to draw them.
UNNAMED_PATTERNS = ("halves", "rings", "zigzag")
DECORATIONS = ("none", "face", "cross", "band")
SCENES = (
    "in the snow",
    "on the grass",
    "on the beach",
    "at night",
    "in front of a brick wall",
    "on a wooden floor",
    "in the sky",
    "under water",
)
RARE_TOKENS = ("sks", "zwx", "ktn", "olis")  # words without a meaning: free to be given one by personalization
_SECOND_COLOURS = {"white": (246, 244, 238), **COLOURS}


@dataclass(frozen=True)
class Look:
    """What makes a thing this thing and no other, wherever it stands.

    Args:
        kind (`str`): One of `CLASSES`.
        colour (`str`): A key of `COLOURS`: the main colour.
        pattern (`str`): One of `PATTERNS` or `UNNAMED_PATTERNS`.
        second (`str`): `"white"` or a key of `COLOURS`: the colour of the pattern.
        decoration (`str`): One of `DECORATIONS`.
    """

    kind: str
    colour: str
    pattern: str
    second: str
    decoration: str


# Subjects: one of each class. Their photos are taken in three scenes only, as people's photos are.
SUBJECTS = {
    "ball": Look("ball", "purple", "zigzag", "yellow", "face"),
    "box": Look("box", "green", "halves", "pink", "cross"),
    "star": Look("star", "blue", "rings", "orange", "face"),
    "heart": Look("heart", "orange", "zigzag", "grey", "band"),
    "house": Look("house", "pink", "rings", "blue", "band"),
    "fish": Look("fish", "yellow", "halves", "purple", "cross"),
    "mug": Look("mug", "red", "zigzag", "green", "face"),
    "boat": Look("boat", "grey", "halves", "orange", "face"),
}
# Eight more, drawn by lot: claims are measured on these, settings were chosen on the ones above.
NEW_SUBJECTS = {
    "new-ball": Look("ball", "yellow", "rings", "pink", "band"),
    "new-box": Look("box", "green", "zigzag", "white", "cross"),
    "new-star": Look("star", "red", "halves", "green", "cross"),
    "new-heart": Look("heart", "orange", "halves", "green", "cross"),
    "new-house": Look("house", "blue", "zigzag", "red", "face"),
    "new-fish": Look("fish", "grey", "rings", "blue", "face"),
    "new-mug": Look("mug", "pink", "halves", "grey", "cross"),
    "new-boat": Look("boat", "purple", "halves", "pink", "band"),
}
LOOKS = SUBJECTS | NEW_SUBJECTS
SUBJECT_SCENES = ("on a wooden floor", "on the grass", "in front of a brick wall")
PHOTOS_PER_SUBJECT = 5


def random_look(rng: Random) -> Look:
    """Draws the look of a thing: a quarter of them have a pattern that captions do not name."""
    colour = rng.choice(tuple(COLOURS))
    pattern = rng.choice(UNNAMED_PATTERNS if rng.random() < 0.25 else PATTERNS)
    named_white = pattern in PATTERNS and rng.random() < 0.6
    second = "white" if named_white else rng.choice([name for name in _SECOND_COLOURS if name != colour])
    decoration = "none" if rng.random() < 0.6 else rng.choice(DECORATIONS[1:])
    return Look(rng.choice(CLASSES), colour, pattern, second, decoration)


def caption_of(look: Look, scene: str, rng: Random | None = None) -> str:
    """Describes a picture, such as `"a photo of a red striped mug in the snow"`.

    Args:
        look (`Look`): The thing. Unnamed patterns, second colours and decorations are left out.
        scene (`str`): One of `SCENES`.
        rng (`random.Random`, *optional*):
            Leaves out the colour, pattern or scene now and then and slips in a word without a meaning, as captions of
            real photos would. Without it, everything that has a name is named.
    """

    def keep(probability: float) -> bool:
        return rng is None or rng.random() < probability

    words = [look.colour] if keep(0.8) else []
    if look.pattern in PATTERNS and keep(0.85):
        words.append(look.pattern)
    if rng is not None and rng.random() < 0.08:
        words.insert(0, rng.choice(RARE_TOKENS))
    words.append(look.kind)
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join(["a photo of", article, *words] + ([scene] if keep(0.9) else []))


def draw(look: Look, scene: str, rng: Random) -> Image.Image:
    """Draws a thing before a scene; position, size, tilt, tones and the scene's details are random.

    Returns:
        `PIL.Image.Image`: RGB, `SIZE` x `SIZE`.
    """
    canvas = _draw_scene(scene, rng)
    _draw_thing(canvas, look, rng)
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def random_picture(rng: Random) -> tuple[Image.Image, Look, str, str]:
    """A picture, its look, its scene and its caption, all drawn from `rng`."""
    look, scene = random_look(rng), rng.choice(SCENES)
    return draw(look, scene, rng), look, scene, caption_of(look, scene, rng)


def subject_photos(name: str) -> list[Image.Image]:
    """The `PHOTOS_PER_SUBJECT` photos of a subject: the same pictures at every call."""
    rng = Random(f"photos of {name}")
    return [draw(LOOKS[name], SUBJECT_SCENES[i % len(SUBJECT_SCENES)], rng) for i in range(PHOTOS_PER_SUBJECT)]


# --- scenes ---


def _tone(colour: tuple, rng: Random, spread: int = 8) -> tuple:
    return tuple(max(0, min(255, c + rng.randint(-spread, spread))) for c in colour)


def _draw_scene(scene: str, rng: Random) -> Image.Image:
    n = _CANVAS
    horizon = int(n * rng.uniform(0.52, 0.66))

    def ground(sky: tuple, floor: tuple) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        image = Image.new("RGB", (n, n), _tone(sky, rng))
        pen = ImageDraw.Draw(image)
        pen.rectangle((0, horizon, n, n), fill=_tone(floor, rng))
        return image, pen

    def spots(pen, count: int, box: tuple, radius: tuple, colour: tuple, flat: float = 1.0) -> None:
        for _ in range(count):
            x, y, r = rng.uniform(box[0], box[2]), rng.uniform(box[1], box[3]), rng.uniform(*radius)
            pen.ellipse((x - r, y - r * flat, x + r, y + r * flat), fill=_tone(colour, rng))

    if scene == "in the snow":
        image, pen = ground((196, 214, 232), (240, 245, 250))
        spots(pen, 3, (0, horizon, n, horizon + 6), (18, 34), (240, 245, 250), 0.4)
        spots(pen, 26, (0, 0, n, n), (1.2, 2.4), (255, 255, 255))
    elif scene == "on the grass":
        image, pen = ground((150, 208, 250), (112, 190, 70))
        for _ in range(34):
            x, y = rng.uniform(0, n), rng.uniform(horizon, n)
            pen.line((x, y, x + rng.uniform(-3, 3), y - rng.uniform(5, 10)), fill=_tone((70, 150, 40), rng), width=2)
    elif scene == "on the beach":
        image, pen = ground((140, 206, 246), (236, 212, 150))
        pen.rectangle((0, horizon - int(n * 0.17), n, horizon), fill=_tone((32, 140, 190), rng))
        spots(pen, 1, (0.1 * n, 0.08 * n, 0.9 * n, 0.16 * n), (9, 12), (255, 240, 130))
        spots(pen, 16, (0, horizon + 4, n, n), (1, 2), (196, 164, 100))
    elif scene == "at night":
        image, pen = ground((16, 20, 58), (28, 34, 50))
        spots(pen, 18, (0, 0, n, horizon), (0.8, 1.8), (250, 250, 220))
        spots(pen, 1, (0.12 * n, 0.1 * n, 0.88 * n, 0.16 * n), (9, 12), (244, 240, 196))
    elif scene == "in front of a brick wall":
        image, pen = Image.new("RGB", (n, n), _tone((206, 190, 176), rng)), None
        pen = ImageDraw.Draw(image)
        left, top = rng.randint(-24, 0), rng.randint(-12, 0)
        for row, y in enumerate(range(top, n, 13)):
            for x in range(left - (12 if row % 2 else 0), n, 25):
                pen.rectangle((x, y, x + 22, y + 10), fill=_tone((158, 84, 66), rng, 12))
    elif scene == "on a wooden floor":
        image, pen = ground((226, 220, 206), (170, 116, 66))
        for i in range(4):
            y = horizon + (n - horizon) * (i / 4) ** 1.4
            pen.line((0, y, n, y), fill=(112, 70, 36), width=2)
            x = rng.uniform(0, n)
            pen.line((x, y, x, y + (n - horizon) * 0.3), fill=(112, 70, 36), width=2)
    elif scene == "in the sky":
        image = Image.new("RGB", (n, n), _tone((110, 176, 240), rng))
        pen = ImageDraw.Draw(image)
        for _ in range(4):
            x, y = rng.uniform(0, n), rng.uniform(0, n)
            spots(pen, 4, (x - 16, y - 4, x + 16, y + 4), (8, 13), (248, 250, 253), 0.7)
    elif scene == "under water":
        image, pen = ground((12, 120, 140), (10, 84, 104))
        for _ in range(3):
            x = rng.uniform(0, n)
            pen.polygon([(x, 0), (x + 10, 0), (x - 12, horizon), (x - 34, horizon)], fill=_tone((30, 142, 160), rng))
        for _ in range(9):
            x, y, r = rng.uniform(0, n), rng.uniform(0, n), rng.uniform(2, 4.5)
            pen.ellipse((x - r, y - r, x + r, y + r), outline=(176, 228, 236), width=2)
    else:
        raise ValueError(f"there is no scene {scene!r}; choose one of {', '.join(SCENES)}")
    return image


# --- things ---
# A thing is made of polygons in coordinates of its own, -1..1, y down: only the body carries colour and pattern.


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> list:
    angles = [math.radians(start + (end - start) * i / 24) for i in range(25)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _star() -> list:
    return [
        (r * math.sin(math.pi * i / 5), 0.08 - r * math.cos(math.pi * i / 5)) for i, r in enumerate([1.08, 0.46] * 5)
    ]


def _heart() -> list:
    points = []
    for i in range(32):
        t = 2 * math.pi * i / 32
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -y / 16 - 0.1))
    return points


_DARK, _LIGHT = (40, 34, 36), (250, 250, 250)
_BODIES = {
    "ball": [_ellipse(0, 0, 0.9, 0.9)],
    "box": [[(-0.95, -0.4), (-0.45, -0.85), (0.95, -0.85), (0.95, 0.4), (0.5, 0.9), (-0.95, 0.9)]],
    "star": [_star()],
    "heart": [_heart()],
    "house": [[(-0.75, -0.1), (0.75, -0.1), (0.75, 0.95), (-0.75, 0.95)], [(-1, -0.1), (0, -1), (1, -0.1)]],
    "fish": [[(0.4, 0), (1.05, -0.6), (1.05, 0.6)], _ellipse(-0.2, 0, 0.82, 0.56)],
    "mug": [
        _ellipse(0.55, 0.05, 0.48, 0.48, -90, 90) + _ellipse(0.55, 0.05, 0.24, 0.24, 90, -90),
        [(-0.85, -0.75), (0.6, -0.75), (0.55, 0.85), (-0.8, 0.85)],
    ],
    "boat": [[(-1, 0.35), (1, 0.35), (0.62, 0.9), (-0.62, 0.9)], [(0, -1), (0.85, 0.2), (0, 0.2)],
             [(-0.1, -0.75), (-0.1, 0.2), (-0.7, 0.2)]],
}  # fmt: skip
_DETAILS = {  # kind: (polygon, colour); two points make a line
    "ball": [(_ellipse(-0.35, -0.42, 0.16, 0.12), _LIGHT)],
    "box": [
        ([(-0.95, -0.4), (0.5, -0.4)], _DARK),
        ([(0.5, -0.4), (0.5, 0.9)], _DARK),
        ([(0.5, -0.4), (0.95, -0.85)], _DARK),
    ],
    "star": [],
    "heart": [],
    "house": [
        ([(-0.16, 0.42), (0.16, 0.42), (0.16, 0.95), (-0.16, 0.95)], _DARK),
        ([(-1, -0.1), (1, -0.1)], _DARK),
    ],
    "fish": [(_ellipse(-0.66, -0.14, 0.14, 0.14), _LIGHT), (_ellipse(-0.69, -0.14, 0.07, 0.07), _DARK)],
    "mug": [(_ellipse(-0.125, -0.75, 0.72, 0.17), (222, 220, 214))],
    "boat": [([(-0.05, -1), (-0.05, 0.35)], _DARK)],
}
_FACE_CENTRES = {
    "house": (0, 0.12),
    "fish": (-0.1, 0.05),
    "boat": (0, 0.62),
    "box": (-0.22, 0.25),
    "mug": (-0.12, 0.1),
}


def _fill(look: Look, unit: float, rng: Random) -> Image.Image:
    """The body's paint over the whole canvas; `unit` is half the size of the thing in pixels."""
    n = _CANVAS
    image = Image.new("RGB", (n, n), _tone(COLOURS[look.colour], rng, 6))
    pen, second, c = ImageDraw.Draw(image), _SECOND_COLOURS[look.second], n // 2
    if look.pattern == "striped":
        step = unit * 0.46
        for i in range(-3, 4):
            x = c + (i + 0.5) * step
            pen.rectangle((x - step * 0.2, 0, x + step * 0.2, n), fill=second)
    elif look.pattern == "dotted":
        step = unit * 0.5
        for i in range(-3, 4):
            for j in range(-3, 4):
                x, y, r = c + (i + 0.5 * (j % 2)) * step, c + j * step, step * 0.25
                pen.ellipse((x - r, y - r, x + r, y + r), fill=second)
    elif look.pattern == "checked":
        step = unit * 0.36
        for i in range(-4, 4):
            for j in range(-4, 4):
                if (i + j) % 2 == 0:
                    x, y = c + i * step, c + j * step
                    pen.rectangle((x, y, x + step * 0.86, y + step * 0.86), fill=second)
    elif look.pattern == "halves":
        pen.rectangle((0, c, n, n), fill=second)
    elif look.pattern == "rings":
        for r in (1.2, 0.6):
            pen.ellipse((c - r * unit, c - r * unit, c + r * unit, c + r * unit), fill=second)
            inner = (r - 0.3) * unit
            pen.ellipse((c - inner, c - inner, c + inner, c + inner), fill=COLOURS[look.colour])
    elif look.pattern == "zigzag":
        step = unit * 0.5
        for j in (-2, 0, 2):
            line = [(c + i * step, c + j * step * 0.7 + (step * 0.5 if i % 2 else 0)) for i in range(-5, 6)]
            pen.line(line, fill=second, width=int(unit * 0.22), joint="curve")
    if look.decoration == "band":
        pen.rectangle((0, c + unit * 0.12, n, c + unit * 0.34), fill=_LIGHT)
        pen.rectangle((0, c + unit * 0.19, n, c + unit * 0.27), fill=(200, 40, 50))
    return image


def _draw_thing(canvas: Image.Image, look: Look, rng: Random) -> None:
    n = _CANVAS
    unit = n * rng.uniform(0.29, 0.35)
    angle = math.radians(rng.uniform(-9, 9))
    x0, y0 = n * rng.uniform(0.43, 0.57), n * rng.uniform(0.47, 0.60)
    cos, sin = math.cos(angle), math.sin(angle)

    def place(points: list) -> list:
        return [(x0 + unit * (x * cos - y * sin), y0 + unit * (x * sin + y * cos)) for x, y in points]

    mask = Image.new("L", (n, n), 0)
    pen = ImageDraw.Draw(mask)
    for body in _BODIES[look.kind]:
        pen.polygon(place(body), fill=255)
    paint = _fill(look, unit, rng).rotate(-math.degrees(angle), Image.Resampling.NEAREST)
    paint = ImageChops.offset(paint, round(x0 - n / 2), round(y0 - n / 2))
    canvas.paste(paint, mask=mask)

    pen = ImageDraw.Draw(canvas)
    for body in _BODIES[look.kind]:
        points = place(body)
        pen.line([*points, points[0]], fill=_DARK, width=3, joint="curve")
    for detail, colour in _DETAILS[look.kind]:
        if len(detail) == 2:
            pen.line(place(detail), fill=colour, width=3)
        else:
            pen.polygon(place(detail), fill=colour)
    x, y = _FACE_CENTRES.get(look.kind, (0, 0))
    if look.decoration == "face":
        for side in (-1, 1):
            pen.polygon(place(_ellipse(x + 0.24 * side, y - 0.12, 0.15, 0.17)), fill=_LIGHT)
            pen.polygon(place(_ellipse(x + 0.24 * side, y - 0.1, 0.08, 0.1)), fill=_DARK)
        pen.line(place(_ellipse(x, y + 0.14, 0.22, 0.14, 20, 160)), fill=_DARK, width=4)
    elif look.decoration == "cross":
        for a, b in (((x - 0.22, y), (x + 0.22, y)), ((x, y - 0.22), (x, y + 0.22))):
            pen.line(place([a, b]), fill=_LIGHT, width=11)
            pen.line(place([a, b]), fill=(200, 40, 50), width=7)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the photos of the subjects of the drawn world.")
    parser.add_argument("--output_dir", default=Path(__file__).parent / "subjects", type=Path)
    args = parser.parse_args()
    for name in LOOKS:
        folder = args.output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, photo in enumerate(subject_photos(name)):
            photo.save(folder / f"{i}.png")


if __name__ == "__main__":
    main()
