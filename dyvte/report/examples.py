"""Samples with their pictures, dense answers and answers with an exit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from dyvte.report.runs import DENSE, Run
from dyvte.report.style import COLOURS, INK


def example_cards(run: Run, policy: str, count: int = 12) -> list[dict[str, Any]]:
    """Samples with a picture: one of every kind in turn, then (a third, if there are any) changed answers.

    Each has ``picture`` (a path), ``question``, ``dense``, ``exit``, ``layer``, ``agrees``, ``right``, ``kind``.
    """
    dense = {row["id"]: row for row in run.rows[DENSE]}
    shown, changed, seen = [], [], {}
    for row in run.rows[policy]:
        picture = run.folder / "images" / f"{row['index']}.png"
        if row["id"] not in dense or not picture.exists():
            continue
        full = dense[row["id"]]
        card = {
            "picture": picture,
            "kind": row["kind"],
            "question": row["question"],
            "answers": list(dict.fromkeys(row["answers"])),
            "dense": full["answer"],
            "exit": row["answer"],
            "layer": row["exit_layer"],
            "agrees": row["agrees"],
        }
        if row["agrees"]:
            seen[row["kind"]] = seen.get(row["kind"], 0) + 1
            shown.append((seen[row["kind"]], row["index"], card))
        else:
            changed.append(card)
    shown.sort(key=lambda item: item[:2])
    changed = changed[: count // 3]
    return [card for _, _, card in shown[: count - len(changed)]] + changed


def plot_examples(cards: Sequence[Mapping[str, Any]], layers: int, columns: int = 4) -> Figure:
    """Pictures with question, answers and exit layer."""
    rows = math.ceil(len(cards) / columns)
    figure = Figure(figsize=(1.95 * columns, 2.75 * rows), layout="constrained")
    for axis, card in itertools.zip_longest(figure.subplots(rows, columns, squeeze=False).flat, cards):
        axis.set_axis_off()
        if card is None:
            continue
        with Image.open(card["picture"]) as picture:
            axis.imshow(picture.convert("RGB"))
        axis.set_title(_wrap(card["question"], 30), fontsize=8, fontweight="normal")
        answer = card["exit"] if card["agrees"] else f"{card['dense']} → {card['exit']}"
        colour = INK if card["agrees"] else COLOURS[1]
        axis.text(0, -0.04, _wrap(answer, 26), transform=axis.transAxes, va="top", fontweight="bold", color=colour)
        axis.text(
            1, -0.04, f"layer {card['layer']} of {layers}", transform=axis.transAxes, va="top", ha="right", fontsize=8
        )
        bar = axis.inset_axes((0, -0.2, 1, 0.04))
        bar.barh([0], [layers], color="#E4E4E4")
        bar.barh([0], [card["layer"]], color=COLOURS[0])
        bar.set_xlim(0, layers)
        bar.set_axis_off()
    return figure


def _wrap(text: str, width: int, lines: int = 3) -> str:
    words, out = text.split(), [""]
    for word in words:
        if len(out[-1]) + len(word) + 1 > width and out[-1]:
            out.append("")
        out[-1] = f"{out[-1]} {word}".strip()
    return "\n".join(out[:lines]) + (" …" if len(out) > lines else "")
