"""Scenes of one or two pictures on a background, with captions that leave facts open.

A scene is a picture (sometimes two) of one of two sizes, at one of five places, on a plain or a
patterned background. A tenth of all combinations of picture, background and place is held out:
they are never drawn for training (`held_out`).

Everything here is a function of the random generator it is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.float32]


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


RESOLUTION = 64
SIZES: dict[str, int] = {"small": 28, "large": 48}
"""Side of a picture in pixels."""
PLACES: dict[str, dict[str, tuple[int, int]]] = {
    "small": {
        "in the middle": (0, 0),
        "at the left": (-16, 0),
        "at the right": (16, 0),
        "at the top": (0, -16),
        "at the bottom": (0, 16),
    },
    "large": {
        "in the middle": (0, 0),
        "at the left": (-8, 0),
        "at the right": (8, 0),
        "at the top": (0, -8),
        "at the bottom": (0, 8),
    },
}
"""Offset (x, y) of a picture's centre from the middle in pixels, y down."""
JITTER = (-4, 0, 4)
"""Pixels that a small picture is moved by where the autoencoder is trained; elsewhere it is not."""
COLORS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (25, 25, 30),
    "red": (225, 60, 55),
    "orange": (250, 150, 50),
    "yellow": (250, 220, 90),
    "green": (85, 175, 90),
    "blue": (70, 130, 225),
    "purple": (150, 95, 200),
    "pink": (250, 170, 200),
}
PATTERNS = ("stripes", "dots", "checks")
PATTERN_COLORS = ("red", "green", "blue", "yellow", "purple", "pink")
BACKGROUNDS: tuple[str, ...] = (
    *(f"{_article(color)} background" for color in COLORS),
    *(f"{color} {pattern}" for color in PATTERN_COLORS for pattern in PATTERNS),
)
OPENNESS = 0.25
TWO_SHARE = 0.2
PLAIN_SHARE = 0.6
LARGE_SHARE = 0.6
HELD_OUT_SHARE = 0.1
GRAMMAR = ("a", "an", "and", "on", "background", "in", "at", "the")
PLACE_WORDS = ("middle", "left", "right", "top", "bottom")


def vocabulary(names: Sequence[str]) -> list[str]:
    """Every word that a caption may contain."""
    words = [*GRAMMAR, *SIZES, *PLACE_WORDS, *COLORS, *PATTERNS]
    return list(dict.fromkeys(words + [word for name in names for word in name.split()]))


@dataclass(frozen=True)
class Part:
    """One picture of a scene: its name, size and place, and the offset it is drawn at."""

    name: str
    size: str
    place: str
    offset: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """One or two pictures on a background."""

    parts: tuple[Part, ...]
    background: str


def held_out(name: str, background: str, place: str) -> bool:
    """Whether a combination is kept from training: a hash decides, the same in every run."""
    digest = hashlib.sha256(f"{name}|{background}|{place}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _part(
    rng: np.random.Generator, name: str, size: str, place: str, jitter: Sequence[int]
) -> Part:
    x, y = PLACES[size][place]
    if size == "small":
        x, y = x + int(rng.choice(jitter)), y + int(rng.choice(jitter))
    return Part(name, size, place, (x, y))


def _background(rng: np.random.Generator) -> str:
    if rng.random() < PLAIN_SHARE:
        return f"{_article(_choose(rng, tuple(COLORS)))} background"
    return f"{_choose(rng, PATTERN_COLORS)} {_choose(rng, PATTERNS)}"


def sample_scene(
    rng: np.random.Generator, names: Sequence[str], jitter: Sequence[int] = (0,)
) -> Scene:
    """Draw any scene, held out or not."""
    background = _background(rng)
    if rng.random() < TWO_SHARE:
        pair = ("at the left", "at the right")
        if rng.random() < 0.5:
            pair = ("at the top", "at the bottom")
        parts = tuple(_part(rng, _choose(rng, names), "small", place, jitter) for place in pair)
        return Scene(parts, background)
    size = "large" if rng.random() < LARGE_SHARE else "small"
    place = _choose(rng, tuple(PLACES[size]))
    return Scene((_part(rng, _choose(rng, names), size, place, jitter),), background)


def is_held_out(scene: Scene) -> bool:
    """Whether a scene shows a combination that is kept from training."""
    return any(held_out(part.name, scene.background, part.place) for part in scene.parts)


def training_scene(
    rng: np.random.Generator, names: Sequence[str], jitter: Sequence[int] = (0,)
) -> Scene:
    """Draw a scene none of whose combinations is held out."""
    while is_held_out(scene := sample_scene(rng, names, jitter)):
        pass
    return scene


def held_out_scene(rng: np.random.Generator, names: Sequence[str]) -> Scene:
    """Draw a scene all of whose combinations are held out."""
    while True:
        scene = sample_scene(rng, names)
        if all(held_out(part.name, scene.background, part.place) for part in scene.parts):
            return scene


def describe(scene: Scene, rng: np.random.Generator, openness: float = OPENNESS) -> str:
    """Write a caption that leaves each size, place and the background out with this probability.

    A second picture is left out with half of it. `openness=0` names everything.

    Example:
        "a small cat at the left and a red apple on green stripes"
    """

    def keep(probability: float = openness) -> bool:
        return bool(rng.random() >= probability)

    phrases = []
    for index, part in enumerate(scene.parts):
        if index > 0 and not keep(openness / 2):
            continue
        phrase = _article(f"{part.size} {part.name}" if keep() else part.name)
        phrases.append(f"{phrase} {part.place}" if keep() else phrase)
    text = " and ".join(phrases)
    return f"{text} on {scene.background}" if keep() else text


def background_pixels(background: str) -> Pixels:
    """A background by its words: (64, 64, 3) in [0, 1]. Patterns repeat every 16 pixels."""
    words = background.removesuffix(" background").split()[-2:]
    words = [word for word in words if word not in ("a", "an")]
    color = np.array(COLORS[words[0]], dtype=np.float32) / np.float32(255)
    canvas = np.broadcast_to(color, (RESOLUTION, RESOLUTION, 3)).copy()
    if len(words) == 1:
        return canvas
    y, x = np.mgrid[:RESOLUTION, :RESOLUTION]
    if words[1] == "stripes":
        mask = x % 16 < 8
    elif words[1] == "checks":
        mask = (x % 16 < 8) ^ (y % 16 < 8)
    else:
        mask = (x % 16 - 7.5) ** 2 + (y % 16 - 7.5) ** 2 < 22
    canvas[mask] = 0.4 * canvas[mask] + 0.6
    return canvas


class Painter:
    """Draws scenes of the given pictures (RGBA, square)."""

    def __init__(self, pictures: Mapping[str, Image.Image]) -> None:
        self.names = list(pictures)
        self._backgrounds = {text: background_pixels(text) for text in BACKGROUNDS}
        self._pictures: dict[tuple[str, str], Pixels] = {}
        for name, picture in pictures.items():
            for size, side in SIZES.items():
                small = picture.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
                self._pictures[name, size] = np.asarray(small, dtype=np.float32) / np.float32(255)

    def render(self, scene: Scene) -> Pixels:
        """Draw a scene: (3, 64, 64) float32 in [-1, 1]."""
        canvas = self._backgrounds[scene.background].copy()
        for part in scene.parts:
            picture = self._pictures[part.name, part.size]
            side = SIZES[part.size]
            left, top = ((RESOLUTION - side) // 2 + shift for shift in part.offset)
            left, top = (min(max(edge, 0), RESOLUTION - side) for edge in (left, top))
            window = canvas[top : top + side, left : left + side]
            window *= 1 - picture[..., 3:]
            window += picture[..., :3]
        pixels: Pixels = np.clip(canvas, 0, 1).transpose(2, 0, 1) * 2 - 1
        return np.ascontiguousarray(pixels, dtype=np.float32)
