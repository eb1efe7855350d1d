"""Sheets of images: the uncached one, each method's, and their differences made visible."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from layercache.errors import LayerCacheError
from layercache.evaluation.metrics import psnr

if TYPE_CHECKING:
    from layercache.evaluation.compare import Comparison

AMPLIFICATION = 20
"""Factor of the absolute differences shown; 0.05 of the range is white."""

_CELL = 128
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

    Nothing is selected: the prompts are the first ones of their list. Small images are enlarged
    without interpolation, so that every pixel is seen as it is.
    """
    image_class, draw_class, font_of = _pillow()
    heading, label = font_of(15), font_of(12)
    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    count = min(count, len(comparison.references))
    block = _LABEL + 2 * (_CELL + _LABEL) + _GAP
    width = _CAPTION + (1 + len(methods)) * (_CELL + _GAP) + _GAP
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
            difference = f"difference x{AMPLIFICATION}"
            draw.text((_GAP, top + 2 * _LABEL + _CELL), difference, fill="#64748b", font=label)
            reference = comparison.references[index]
            _paste(sheet, draw, label, (_CAPTION, top), "uncached", reference, None)
            for column, method in enumerate(methods, start=1):
                if method not in rows:
                    continue
                image = comparison.images[method, target][index]
                left = _CAPTION + column * (_CELL + _GAP)
                gap = (image - reference).abs() * AMPLIFICATION
                value = f"{float(psnr(image[None], reference[None])):.1f} dB"
                _paste(sheet, draw, label, (left, top), method, image, (gap, value))
            top += block
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _paste(
    sheet: Any,
    draw: Any,
    font: Any,
    corner: tuple[int, int],
    name: str,
    image: Tensor,
    difference: tuple[Tensor, str] | None,
) -> None:
    left, top = corner
    draw.text((left, top), name, fill="#0f172a", font=font)
    sheet.paste(_enlarged(image), (left, top + _LABEL))
    if difference is not None:
        gap, value = difference
        draw.text((left, top + _LABEL + _CELL + 2), value, fill="#334155", font=font)
        low = top + 2 * _LABEL + _CELL
        sheet.paste(_enlarged(gap), (left, low))
        # Large differences are white, as the page is.
        draw.rectangle((left, low, left + _CELL - 1, low + _CELL - 1), outline="#cbd5e1")


def _enlarged(image: Tensor) -> Any:
    """One image (C, H, W) in [0, 1] as a picture of `_CELL` pixels a side."""
    image_class, _, _ = _pillow()
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    small = max(image.shape[1:]) <= _CELL
    picture = image_class.fromarray(pixels)
    resample = image_class.Resampling.NEAREST if small else image_class.Resampling.LANCZOS
    return picture.resize((_CELL, _CELL), resample)


def _pillow() -> tuple[Any, Any, Any]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise LayerCacheError(
            "image sheets need Pillow, which is not installed: pip install 'layercache-flow[plot]'"
        ) from error
    return Image, ImageDraw.Draw, ImageFont.load_default
