"""Procedural 32x32 scenes with captions: the data that the reference model is trained on.

A scene is one or two shaded, textured objects on a patterned background. Its caption names some
of what is drawn and leaves the rest open (position, size, texture, colour or a whole object), so a
model that is trained on it has to decide things for itself, as large text-to-image models do.

Everything here is numpy and a function of the random generator it is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_T = TypeVar("_T")

RESOLUTION = 32

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "star")
TEXTURES = ("plain", "striped", "checkered", "dotted")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "center")
PATTERNS = ("smooth", "tiled", "lined")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.15, 0.70, 0.20),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.98, 0.88, 0.15),
    "orange": (1.00, 0.55, 0.08),
    "purple": (0.60, 0.20, 0.80),
    "cyan": (0.10, 0.85, 0.90),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.06, 0.06, 0.08),
    "gray": (0.45, 0.45, 0.48),
    "brown": (0.40, 0.26, 0.15),
    "navy": (0.08, 0.10, 0.32),
}
GRAMMAR = ("a", "and", "on", "background", "shape")

WORDS: tuple[str, ...] = (
    *GRAMMAR,
    *SHAPES,
    *TEXTURES,
    *SIZES,
    *PLACES,
    *PATTERNS,
    *COLORS,
    *BACKGROUNDS,
)
"""Every word a caption may contain."""


@dataclass(frozen=True)
class SceneObject:
    """One object: its words and, in units of the image side, where and how it is drawn."""

    shape: str
    color: str
    texture: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    angle: float
    texture_angle: float
    texture_period: float
    texture_phase: float


@dataclass(frozen=True)
class Scene:
    """A background and one or two objects that do not overlap."""

    objects: tuple[SceneObject, ...]
    background: str
    pattern: str
    light_angle: float
    pattern_period: float
    pattern_phase: tuple[float, float]


def _choose(rng: np.random.Generator, options: tuple[_T, ...]) -> _T:
    return options[int(rng.integers(len(options)))]


def _sample_object(rng: np.random.Generator, place: str, size: str) -> SceneObject:
    centers = {
        "left": (0.25, 0.50),
        "right": (0.75, 0.50),
        "top": (0.50, 0.25),
        "bottom": (0.50, 0.75),
        "center": (0.50, 0.50),
    }
    x, y = centers[place]
    jitter = 0.05 if place != "center" else 0.03
    return SceneObject(
        shape=_choose(rng, SHAPES),
        color=_choose(rng, tuple(COLORS)),
        texture=_choose(rng, TEXTURES),
        size=size,
        place=place,
        x=x + float(rng.uniform(-jitter, jitter)),
        y=y + float(rng.uniform(-jitter, jitter)),
        radius=float(rng.uniform(0.16, 0.18) if size == "small" else rng.uniform(0.22, 0.25)),
        angle=float(rng.uniform(-0.25, 0.25)),
        texture_angle=float(rng.choice([0.0, np.pi / 2, np.pi / 4, -np.pi / 4])),
        texture_period=float(rng.uniform(0.11, 0.15)),
        texture_phase=float(rng.uniform(0.0, 1.0)),
    )


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene. The same generator state gives the same scene."""
    if rng.random() < 0.45:
        places: tuple[str, ...] = (_choose(rng, PLACES),)
    else:
        places = _choose(
            rng, (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"))
        )
    objects = []
    for place in places:
        objects.append(_sample_object(rng, place, _choose(rng, SIZES)))
    return Scene(
        objects=tuple(objects),
        background=_choose(rng, tuple(BACKGROUNDS)),
        pattern=_choose(rng, PATTERNS),
        light_angle=float(rng.uniform(0.0, 2 * np.pi)),
        pattern_period=float(rng.uniform(0.18, 0.28)),
        pattern_phase=(float(rng.uniform()), float(rng.uniform())),
    )


def describe(scene: Scene, rng: np.random.Generator, openness: float = 0.4) -> str:
    """Write a caption, leaving each fact out with probability `openness`.

    `openness=0` names everything. A second object is left out altogether with probability
    `openness / 2`, and the background with probability `openness`.
    """

    def keep() -> bool:
        return bool(rng.random() >= openness)

    phrases = []
    for index, obj in enumerate(scene.objects):
        if index > 0 and rng.random() < openness / 2:
            continue
        words = ["a"]
        words += [obj.size] if keep() else []
        words += [obj.color] if keep() else []
        words += [obj.texture] if keep() else []
        words += [obj.shape] if keep() else ["shape"]
        words += [obj.place] if keep() else []
        phrases.append(" ".join(words))
    text = " and ".join(phrases)
    if keep():
        background = [scene.background]
        background += [scene.pattern] if keep() else []
        text += " on a " + " ".join(background) + " background"
    return text
