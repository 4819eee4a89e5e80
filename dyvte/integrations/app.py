"""A page to ask about images, answered with exits and dense: ``dyvte app``."""

from __future__ import annotations

import base64
import io
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import jinja2
from PIL import Image

from dyvte.cli.configs import AppConfig
from dyvte.data import Sample
from dyvte.data.images import read_image
from dyvte.evaluation.side_by_side import Comparison, SideBySide

FORMATS = ("JPEG", "PNG", "WEBP")
LONGEST = 2_000  # characters of a question
WAITING = 20  # questions in the queue
IMAGE = {"sources": ["upload", "clipboard"], "height": 280, "buttons": [], "show_label": False, "elem_id": "image"}
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("dyvte.integrations", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
TEMPLATES.filters["duration"] = lambda s: f"{s:.2f}\xa0s" if s >= 1 else f"{1000 * s:.0f}\xa0ms"
INTRODUCTION = "# When does the image stop mattering?\nAsk about a picture. dyvte answers twice: dense, and with exits."
SCENES = " The reference model knows nothing but drawings of coloured digits such as those below."


def read_upload(path: str | Path | None, megapixels: int) -> Image.Image:
    """The image of a file from outside, as RGB.

    Raises:
        ValueError: none, one of another format, one that is too large, or one that is broken.
    """
    if path is None:
        raise ValueError("Choose an image first, one of yours or an example.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is our own
            with Image.open(path, formats=FORMATS) as image:  # reads its head alone
                large = image.width * image.height > megapixels * 1_000_000
    except Image.DecompressionBombError:
        large = True
    except (OSError, SyntaxError, ValueError):
        raise ValueError("This file is no image in JPEG, PNG or WebP: choose another one.") from None
    if large:
        raise ValueError(f"This image has more than the {megapixels} megapixels that are allowed: make it smaller.")
    return read_image(str(path), Path())


def show(result: Comparison | None = None, fault: str | None = None) -> str:
    """The results as HTML, or why there are none; whatever a model or a user wrote is text there."""
    picture = None
    if result is not None and result.picture is not None:
        buffer = io.BytesIO()
        result.picture.save(buffer, "PNG")
        picture = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return TEMPLATES.get_template("app.html").render(result=result, picture=picture, fault=fault)


def build(asked: SideBySide, samples: Sequence[Sample], config: AppConfig) -> gr.Blocks:
    """The page. Faults of its users reach them as sentences."""

    def ask(upload: dict[str, Any] | None, question: str | None, percent: float) -> str:
        try:
            if not (question := (question or "").strip()):
                raise ValueError("Write a question first.")
            if len(question) > LONGEST:
                raise ValueError(f"The question has {len(question)} characters, and {LONGEST} are allowed: shorten it.")
            image = read_upload(upload and upload["path"], config.megapixels)
            return show(asked.ask(image, question, percent / 100))
        except ValueError as error:
            return show(fault=str(error))
        except Exception:
            logging.getLogger(__name__).exception("a question could not be answered")
            return show(fault="The model could not answer this; the log of the server says why.")

    least = math.ceil(1000 * asked.least_risk) / 10
    examples = [[sample.images[0], sample.question] for sample in samples]
    with gr.Blocks(title="dyvte", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(INTRODUCTION + (SCENES if config.data is None else ""))
        with gr.Row():
            with gr.Column():
                image = gr.Image(samples[0].images[0], **IMAGE)
                question = gr.Textbox(samples[0].question, label="Question", max_length=LONGEST, elem_id="question")
                label = "Answers that may change (%)"
                risk = gr.Slider(least, max(10, 2 * least), 100 * config.risk, step=0.1, label=label)
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column():
                result = gr.HTML(show(), elem_id="result", padding=False)
        gr.Examples(examples, [image, question], label="Examples", elem_id="examples")
        # gradio checks that the file was uploaded here, but does not open it before its size is known.
        ways = {"inputs": [image, question, risk], "outputs": result, "concurrency_id": "model", "preprocess": False}
        button.click(ask, **ways, api_name="ask")
        question.submit(ask, **ways, api_visibility="private")
    return page.queue(max_size=WAITING, default_concurrency_limit=1)


def serve(asked: SideBySide, samples: Sequence[Sample], config: AppConfig, block: bool = True) -> gr.Blocks:
    """Opens the page at ``config.host`` and ``config.port``; until it is ended, if ``block``."""
    page = build(asked, samples, config)
    page.launch(
        server_name=config.host,
        server_port=config.port,
        share=False,
        max_file_size=config.megabytes * 1024**2,
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=(Path(__file__).parent / "app.css").read_text(),
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        prevent_thread_lock=not block,
    )
    return page
