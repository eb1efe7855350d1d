"""Scenes drawn: the images that the reference model is trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from layercache.reference._scenes import BACKGROUNDS, COLORS, RESOLUTION, Scene, SceneObject

Image = NDArray[np.float32]
_Array = NDArray[Any]
_SUPERSAMPLING = 2


def _inside(obj: SceneObject, x: _Array, y: _Array) -> Any:
    """Which points (relative to the centre, in units of the radius, y down) the shape covers."""
    c, s = np.cos(obj.angle), np.sin(obj.angle)
    u, v = c * x + s * y, -s * x + c * y
    if obj.shape == "circle":
        return u * u + v * v < 1.0
    if obj.shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.85
    if obj.shape == "triangle":
        return (v < 0.75) & (abs(u) < 0.5 * (v + 1.1))
    if obj.shape == "diamond":
        return abs(u) * 1.25 + abs(v) < 1.15
    if obj.shape == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.32) & (np.maximum(abs(u), abs(v)) < 1.0)
    if obj.shape == "ring":
        radius = np.sqrt(u * u + v * v)
        return (radius < 1.05) & (radius > 0.55)
    # A five-pointed star: the boundary's radius as a function of the angle.
    theta = np.arctan2(u, -v)
    sector = abs((theta / (2 * np.pi / 5) + 0.5) % 1.0 - 0.5) * (2 * np.pi / 5)
    edge = 0.47 / (np.cos(sector) * 0.41 + np.sin(sector) * 0.92)
    return np.sqrt(u * u + v * v) < np.minimum(edge * 1.02, 1.2)


def _texture(obj: SceneObject, x: _Array, y: _Array) -> Any:
    """Where the object's second, darker tone goes."""
    if obj.texture == "plain":
        return np.zeros(x.shape, dtype=bool)
    c, s = np.cos(obj.texture_angle), np.sin(obj.texture_angle)
    u = (c * x + s * y) / obj.texture_period + obj.texture_phase
    v = (-s * x + c * y) / obj.texture_period + obj.texture_phase
    if obj.texture == "striped":
        return u % 1.0 < 0.5
    if obj.texture == "checkered":
        return (u % 1.0 < 0.5) ^ (v % 1.0 < 0.5)
    return (u % 1.0 - 0.5) ** 2 + (v % 1.0 - 0.5) ** 2 < 0.09


def render(scene: Scene) -> Image:
    """Draw the scene: (3, 32, 32) float32 in [-1, 1]."""
    side = RESOLUTION * _SUPERSAMPLING
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    y, x = np.meshgrid(axis, axis, indexing="ij")

    base = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    light = np.cos(scene.light_angle) * (x - 0.5) + np.sin(scene.light_angle) * (y - 0.5)
    tone = 1.0 + 0.5 * light
    u = x / scene.pattern_period + scene.pattern_phase[0]
    v = y / scene.pattern_period + scene.pattern_phase[1]
    if scene.pattern == "tiled":
        tone = tone + 0.55 * ((u % 1.0 < 0.22) | (v % 1.0 < 0.22))
    elif scene.pattern == "lined":
        tone = tone + 0.55 * ((u + v) % 1.0 < 0.35)
    canvas = base[:, None, None] * tone[None]
    canvas = canvas + 0.03 * (tone[None] - 1.0)

    for obj in scene.objects:
        dx, dy = (x - obj.x) / obj.radius, (y - obj.y) / obj.radius
        shade = 0.85 + 0.35 * (np.cos(scene.light_angle) * dx + np.sin(scene.light_angle) * dy)
        shade = shade * np.where(_texture(obj, x - obj.x, y - obj.y), 0.42, 1.0)
        color = np.array(COLORS[obj.color], dtype=np.float32)[:, None, None] * shade[None]
        canvas = np.where(_inside(obj, dx, dy)[None], color, canvas)

    pixels = canvas.reshape(3, RESOLUTION, _SUPERSAMPLING, RESOLUTION, _SUPERSAMPLING)
    image: Image = (np.clip(pixels.mean(axis=(2, 4)), 0.0, 1.0) * 2.0 - 1.0).astype(np.float32)
    return image
