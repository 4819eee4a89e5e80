"""Pictures as RGB, whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, ImageOps

from dyvte.data.errors import DamageError


def read_image(value: Any, folder: Path) -> Image.Image:
    """A picture, its bytes, its file (relative to ``folder``), or ``{bytes, path}`` of these, as RGB.

    It stands upright if its EXIF data say how. The name of a file says nothing about its format, and of several
    frames the first one counts.

    Raises:
        DamageError: no such file, or one that is broken, cut off, or of more than eight bits a channel.
        ValueError: Pillow was told to fill up pictures that are cut off.
    """
    name = None
    if isinstance(value, Mapping):
        name, value = value.get("path"), value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        return _rgb(value, None)
    if isinstance(value, str):
        file = str(folder / value)
        return _decode(Path(file), file)
    if isinstance(value, bytes):
        return _decode(io.BytesIO(value), name)
    raise DamageError(f"an image is a picture, its bytes or its file name, not {type(value).__name__}")


def _decode(source: Path | io.BytesIO, file: str | None) -> Image.Image:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so pictures that are cut off would be filled up with grey "
            "unnoticed: set it to False"
        )
    try:
        with Image.open(source) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image, file)
    except (DamageError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise DamageError("there is no such file", file) from None
    except Image.UnidentifiedImageError:
        raise DamageError("not a picture, or broken at its beginning", file) from None
    except Exception as error:  # broken files make Pillow's readers raise a dozen kinds
        raise DamageError(f"a picture that cannot be read: {error}", file) from error


def _rgb(image: Image.Image, file: str | None) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow would cut these off at 255: a white picture
        raise DamageError(f"a picture of mode {image.mode}: convert it to eight bits a channel", file)
    return image.convert("RGB")
