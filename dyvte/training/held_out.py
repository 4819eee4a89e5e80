"""A promise is worth something only on samples that trained nothing: told by content, whatever their ids and files."""

from __future__ import annotations

import numpy as np
import torch

from dyvte.training.content import Content


def check_held_out(trained_on: dict[str, torch.Tensor], content: Content, shared_images: bool = False) -> int:
    """Refuses samples that trained the heads.

    Args:
        trained_on: what the heads remember, see :meth:`Content.sketch`.
        content: of the samples to calibrate on.
        shared_images: other questions about images of training are allowed.

    Returns:
        How many of the images to calibrate on are images of training.

    Raises:
        ValueError: there are such samples, or such images where they are not allowed.
    """
    same = len(np.intersect1d(content.samples, trained_on["samples"].numpy()))
    if same:
        raise ValueError(
            f"{same} of the {len(content.samples)} samples to calibrate on are those the heads were trained on, by "
            "image and question, so no promise would follow: trace other samples, with other images"
        )
    images = np.unique(content.images)
    shared = len(np.intersect1d(images, trained_on["images"].numpy()))
    if shared and not shared_images:
        raise ValueError(
            f"{shared} of the {len(images)} images to calibrate on are images of training, so the promise would be "
            "about images that the heads know: trace other images, or allow it with shared_images=true"
        )
    return shared
