"""Sheets of images: the uncached one, each method's, and their differences made visible.

A video is shown as a strip of its frames.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layercache.errors import LayerCacheError
from layercache.evaluation.metrics import psnr

if TYPE_CHECKING:
    from layercache.evaluation._compare import Comparison

AMPLIFICATION = 20
"""Factor of the absolute differences shown; 0.05 of the range is white."""

FRAMES = 3
"""Most frames of a video that are shown: the first, the last, the others evenly between them."""

_CELL = 192
_GAP = 10
_LABEL = 18
_HEADING = 30
_CAPTION = 150


def image_sheet(
    comparison: Comparison,
    prompts: Sequence[str],
    count: int = 3,
    heading_of: Callable[[float], str] = lambda target: f"{target:g}x less compute",
) -> bytes:
    """A PNG with the first `count` prompts at every target: a row of images, a row of differences.

    Nothing is selected: the prompts are the first ones of their list, and of a video `FRAMES`
    frames are shown. Small images are enlarged without interpolation, so that every pixel is seen
    as it is.

    Raises:
        LayerCacheError: Pillow is not installed, or the comparison is one of latents.
    """
    image_class, draw_class, font_of = _pillow()
    heading, label = font_of(15), font_of(12)
    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    references = comparison.references
    count = min(count, len(references))
    block = _LABEL + 2 * (_CELL + _LABEL) + _GAP
    cell = _CELL * len(_shown(references[0]))
    width = _CAPTION + (1 + len(methods)) * (cell + _GAP) + _GAP
    height = len(comparison.targets) * (_HEADING + count * block) + _HEADING
    sheet = image_class.new("RGB", (width, height), "white")
    draw = draw_class(sheet)
    top = _GAP
    for target in comparison.targets:
        rows = {row.method: row for row in comparison.at(target)}
        draw.text((_GAP, top), heading_of(target), fill="#0f172a", font=heading)
        top += _HEADING
        for index in range(count):
            caption = textwrap.fill(prompts[index], 20)
            draw.multiline_text((_GAP, top + _LABEL), caption, fill="#334155", font=label)
            reference = references[index]
            _paste(sheet, draw, label, (_CAPTION, top), "uncached", reference)
            for column, method in enumerate(methods, start=1):
                if method not in rows:
                    continue
                image = comparison.images[method, target][index]
                left = _CAPTION + column * (cell + _GAP)
                value = f"{method}  {float(psnr(image[None], reference[None])):.1f} dB"
                _paste(sheet, draw, label, (left, top), value, image)
                gap = (image - reference).abs() * AMPLIFICATION
                below = (left, top + _LABEL + _CELL)
                _paste(sheet, draw, label, below, f"difference x{AMPLIFICATION}", gap)
            top += block
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _paste(
    sheet: Any, draw: Any, font: Any, corner: tuple[int, int], name: str, image: Tensor
) -> None:
    """A picture with its label above it."""
    left, top = corner
    draw.text((left, top + 2), name, fill="#0f172a", font=font)
    strip = _strip(image)
    sheet.paste(strip, (left, top + _LABEL))
    # White pictures end where the page begins.
    frame = (left, top + _LABEL, left + strip.width - 1, top + _LABEL + _CELL - 1)
    draw.rectangle(frame, outline="#cbd5e1")


def _shown(picture: Tensor) -> list[Tensor]:
    """The frames (C, H, W) of an image or video that are shown."""
    if picture.ndim == 3:
        return [picture]
    count = min(FRAMES, len(picture))
    return [picture[int(i)] for i in torch.linspace(0, len(picture) - 1, count).round()]


def _strip(picture: Tensor) -> Any:
    """One image (C, H, W) or video (F, C, H, W) in [0, 1] as a row of cells."""
    image_class, _, _ = _pillow()
    frames = _shown(picture)
    strip = image_class.new("RGB", (_CELL * len(frames), _CELL), "white")
    for index, frame in enumerate(frames):
        fitted = _fitted(frame)
        left = index * _CELL + (_CELL - fitted.width) // 2
        strip.paste(fitted, (left, (_CELL - fitted.height) // 2))
    return strip


def _fitted(image: Tensor) -> Any:
    """One image (C, H, W) in [0, 1] as a picture whose longer side has `_CELL` pixels."""
    image_class, _, _ = _pillow()
    colours = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    pixels = (colours.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    height, width = pixels.shape[:2]
    longer = max(height, width)
    resample = image_class.Resampling.NEAREST if longer <= _CELL else image_class.Resampling.LANCZOS
    size = (max(1, round(width * _CELL / longer)), max(1, round(height * _CELL / longer)))
    return image_class.fromarray(pixels).resize(size, resample)


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise LayerCacheError(
            "image sheets need Pillow, which is not installed: pip install 'layercache-flow[plot]'"
        ) from error
    return Image, ImageDraw.Draw, ImageFont.load_default
