"""What a model does, layer by layer: who its text attends to, what leaving would change, how fast the text changes.

Three views side by side make the stages visible that DyVTE (arXiv 2411.19628) found: text first takes in the image
(early fusion), then mostly reads text (intra-modality modelling), then puts both together (multimodal reasoning),
after which the visual tokens are no longer needed. :func:`inspect_model` writes a folder:

    inspect.json    the numbers, over all samples and per kind of question
    inspect.png     the figure
    traces/         the traces behind it, see :mod:`dyvte.training.store`
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter
from torch import nn
from tqdm.auto import tqdm

from dyvte.data import Sample, batches, encode
from dyvte.evaluation.runner import hardware, weights_fingerprint
from dyvte.report.page import COLOURS, FAINT, INK, STYLE
from dyvte.runtime.attention import AttentionRows, call_arguments, find_attention
from dyvte.runtime.tokens import Prompt, find_decoder, underlying_model, visual_tokens
from dyvte.training.store import TraceSet, load_traces, write_traces
from dyvte.version import __version__

SEEN = ("visual", "prompt", "text")
READERS = ("text", "last")
SAFE = 0.99  # of the answers unchanged: where the figure says that the visual tokens are no longer needed


@dataclass
class Shares:
    """Where attention goes in every decoder layer, averaged over heads.

    Attributes:
        share: float32 [batch, L, 2, 3]; the readers are the text tokens after the image (mean) and the last one of
            them alone, and they see visual tokens, the prompt's text before them, and text after them. Sums to 1.
        tokens: long [batch, 3], how many tokens there are of each.
    """

    share: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def attention_shares(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    visual_mask: torch.Tensor | None = None,
    decoder: str | nn.Module | None = None,
) -> Shares:
    """How much attention the text after the image pays to whom, in one forward pass over a batch of prompts.

    "After the image" is after the last visual token; text between two images counts as before. The model keeps its
    attention implementation; the rows of the text tokens are computed a second time, head group by head group, and
    reduced at once.

    Args:
        model: any MLLM of transformers, or a decoder-only model fed with ``inputs_embeds``.
        inputs: what the model takes, padded on either side.
        visual_mask: bool [batch, sequence], where ``input_ids`` cannot show the visual tokens.
        decoder: the module that owns the decoder layers, or the dotted path to it.

    Raises:
        ValueError: a sample without visual tokens or without text after them, or attention that cannot be read.
    """
    model = underlying_model(model)
    layers = find_decoder(model, decoder).layers
    attentions = [find_attention(layer) for layer in layers]
    if visual_mask is None:
        if inputs.get("input_ids") is None:
            raise ValueError("without input_ids nothing shows the visual tokens: pass visual_mask [batch, sequence]")
        visual_mask = visual_tokens(model, inputs["input_ids"])
    valid = inputs.get("attention_mask")
    prompt = Prompt.of(visual_mask, torch.ones_like(visual_mask) if valid is None else valid.bool())
    if not bool(prompt.can_leave.all()):
        rows = (~prompt.can_leave).nonzero().flatten().tolist()
        raise ValueError(f"samples {rows} have no visual tokens, or no text after them: leave them out")
    column = torch.arange(visual_mask.shape[1], device=visual_mask.device)
    last_visual = torch.where(prompt.visual, column, -1).amax(1, keepdim=True)
    groups = [prompt.visual, prompt.text & (column < last_visual), prompt.text & (column > last_visual)]
    seen = torch.stack(groups, -1)  # [batch, sequence, 3]
    share = torch.zeros(len(seen), len(layers), len(READERS), len(SEEN))
    rows: dict[int, AttentionRows] = {}

    def before(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows[index] = read = AttentionRows(module, call_arguments(module, args, kwargs), prompt.tail)
        target = seen.to(read.key.device, torch.float32)
        paid = sum((weights.sum(1) @ target for weights in read), torch.zeros(())) / read.query.shape[1]
        weight = prompt.tail.valid.to(paid)[..., None]
        mean = (paid * weight).sum(1) / weight.sum(1)
        share[:, index] = torch.stack([mean, paid[:, -1]], 1).cpu()

    def after(index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        rows.pop(index).check(output, prompt.tail)

    hooks = []
    try:
        for index, attention in enumerate(attentions):
            hooks.append(attention.register_forward_pre_hook(functools.partial(before, index), with_kwargs=True))
            hooks.append(attention.register_forward_hook(functools.partial(after, index), with_kwargs=True))
        model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Shares(share, seen.sum(1).cpu())


def state_similarity(state: torch.Tensor) -> torch.Tensor:
    """Cosine between the text states after consecutive layers.

    Args:
        state: [n, L, 2d], see :meth:`dyvte.runtime.tokens.Prompt.text_state`.

    Returns:
        float32 [n, L - 1, 2]: for the mean of the text tokens and for the last token; place e - 1 compares the states
        after e and e + 1 layers.
    """
    halves = state.float().unflatten(-1, (2, -1))
    return F.cosine_similarity(halves[:, 1:], halves[:, :-1], dim=-1)


def inspect_model(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    output: str | os.PathLike,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    template: str | None = None,
    title: str | None = None,
    config: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Looks into a model while it answers questions, and writes numbers and one figure.

    Costs a trace (the answer, then one pass with all exits beside it) and one more forward pass per sample.

    Args:
        model: the MLLM, in evaluation mode.
        processor: its processor.
        samples: questions about images, see :mod:`dyvte.data.sources`.
        output: folder, see the module's text. Traces that are there already, of the same model and samples, are used.
        batch_size: samples per forward pass.
        max_new_tokens: longest answer.
        template: chat template, where the processor has none.
        title: of the figure; default: the model's name and the number of questions.
        config: anything else to keep with the numbers.
        progress: whether to show a bar.

    Returns:
        The content of ``inspect.json``: lists over layers, where attention of layer e and what exit layer e changes
        stand at place e - 1, and similarity at place e - 1 compares the states after e and e + 1 layers.

    Raises:
        ValueError: no samples, samples without images, attention that cannot be read, or a folder with traces of
            something else.
    """
    if len(samples) == 0:
        raise ValueError("there are no samples to inspect: check the data config")
    without = [sample.id for sample in samples if not sample.images]
    if without:
        raise ValueError(f"{len(without)} samples have no image, such as {without[0]!r}: leave them out")
    base, output = underlying_model(model), Path(output)
    for layer in find_decoder(base).layers:
        find_attention(layer)
    shares, tokens = [], []
    for batch in tqdm(list(batches(samples, batch_size)), desc="attention", unit="batch", disable=not progress):
        found = attention_shares(model, encode(processor, batch, template).to(model.device, model.dtype))
        shares.append(found.share)
        tokens.append(found.tokens)
    asked = json.dumps([[sample.id, sample.question, sample.answers] for sample in samples])
    made_from = {
        "weights": weights_fingerprint(model),
        "questions": hashlib.sha256(asked.encode()).hexdigest()[:16],
        "images": getattr(samples, "fingerprint", None),
        "template": template,
    }
    folder = write_traces(
        model,
        processor,
        samples,
        output / "traces",
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        template=template,
        provenance=made_from,
    )
    traces = load_traces(folder)
    name = getattr(base.config, "_name_or_path", "") or None
    result = {"model": Path(name).name if name else type(base).__name__, "layers": traces.num_layers}
    result |= summarise(traces, torch.cat(shares), torch.cat(tokens))
    result |= {
        "config": dict(config or {}),
        "hardware": hardware(model),
        "versions": {
            "dyvte": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (output / "inspect.json").write_text(json.dumps(result, indent=2) + "\n")
    with matplotlib.rc_context(STYLE):
        plot_layers(result, title).savefig(output / "inspect.png")
    return result


def summarise(traces: TraceSet, share: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
    """Means over samples by layer, over all and per kind.

    Args:
        traces: n samples in L layers.
        share: [n, L, 2, 3], see :class:`Shares`.
        tokens: [n, 3].
    """
    similarity = state_similarity(traces.state)
    same = (traces.agreement >= 1).double()

    def means(index: torch.Tensor) -> dict[str, Any]:
        def mean(values: torch.Tensor) -> list[float]:
            return [round(value, 6) for value in values[index].double().mean(0).tolist()]

        good = same[index].mean(0) >= SAFE
        # From there on, not only there: a single lucky layer is not the end of the need for the image.
        lasting = good.flip(0).cumprod(0).flip(0).bool()
        return {
            "samples": len(index),
            "tokens": {name: round(tokens[index, i].double().mean().item(), 2) for i, name in enumerate(SEEN)},
            "attention": {
                f"from_{reader}": {f"to_{name}": mean(share[:, :, r, i]) for i, name in enumerate(SEEN)}
                for r, reader in enumerate(READERS)
            },
            "agreement": mean(same),
            "kl": mean(traces.kl),
            "similarity": {reader: mean(similarity[..., r]) for r, reader in enumerate(READERS)},
            "unneeded_from": int(lasting.int().argmax()) + 1,
        }

    kinds = sorted({kind for kind in traces.kinds if kind})
    whole = means(torch.arange(len(traces)))
    if len(kinds) > 1:
        places = {kind: torch.tensor([i for i, k in enumerate(traces.kinds) if k == kind]) for kind in kinds}
        whole["by_kind"] = {kind: means(index) for kind, index in places.items()}
    return whole


def plot_layers(result: dict[str, Any], title: str | None = None) -> Figure:
    """Three panels over the decoder layers: attention of the text, what leaving changes, change of the text state."""
    layers = list(range(1, result["layers"] + 1))
    figure = Figure(figsize=(5.6, 6.6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[1.15, 1.15, 0.9])
    _plot_attention(top, layers, result)
    _plot_change(middle, layers, result)
    _plot_similarity(bottom, layers, result)
    bottom.set_xlabel("decoder layer")
    bottom.set_xlim(0.6, result["layers"] + 0.4)
    bottom.xaxis.set_major_locator(
        FixedLocator(layers) if len(layers) <= 16 else MaxNLocator(nbins=12, integer=True, steps=[1, 2, 4, 5, 10])
    )
    unneeded = result["unneeded_from"]
    if unneeded < result["layers"]:
        for axes in (top, middle, bottom):
            axes.axvline(unneeded, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    figure.suptitle(title or f"{result['model']}, {result['samples']:,} questions", fontsize=10, color=INK)
    return figure


def _plot_attention(axes: Axes, layers: list[int], result: dict[str, Any]) -> None:
    from_text, from_last = result["attention"]["from_text"], result["attention"]["from_last"]
    named = {"visual": "visual tokens", "prompt": "text before the image", "text": "text after the image"}
    for name, colour, marker in zip(SEEN, COLOURS, ("o", "s", "^")):
        axes.plot(layers, from_text[f"to_{name}"], color=colour, marker=marker, markersize=4, label=named[name])
        axes.plot(layers, from_last[f"to_{name}"], color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.plot([], [], color=FAINT, linewidth=0.9, linestyle=(0, (4, 2)), label="dashed: from the last token only")
    share = result["tokens"]["visual"] / sum(result["tokens"].values())
    axes.axhline(share, color=FAINT, linewidth=1.1, linestyle=":", label=f"visual share of all tokens, {share:.0%}")
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("Where the text after the image looks")
    axes.set_ylabel("share of attention")
    axes.legend(fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.04), handlelength=2.2)


def _plot_change(axes: Axes, layers: list[int], result: dict[str, Any]) -> None:
    for number, numbers in enumerate(result.get("by_kind", {}).values()):
        label = "each kind of question" if number == 0 else None
        axes.plot(layers, numbers["agreement"], color=FAINT, linewidth=0.7, alpha=0.8, zorder=1.5, label=label)
    axes.plot(layers, result["agreement"], color=COLOURS[0], marker="o", markersize=4, label="answers unchanged")
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("answers unchanged", color=COLOURS[0])
    axes.set_title("What leaving after this layer changes")
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)
    kl = [value if value > 1e-6 else float("nan") for value in result["kl"]]
    right.semilogy(
        layers, kl, color=COLOURS[1], marker="s", markersize=3.5, linestyle=(0, (4, 2)), label="KL of the next token"
    )
    right.set_ylabel("KL of the next token, nats", color=COLOURS[1])
    handles = [h for a in (axes, right) for h in a.get_legend_handles_labels()[0]]
    if result["unneeded_from"] < result["layers"]:
        text = f"from here on at least {SAFE:.0%} unchanged"
        handles += axes.plot([], [], color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label=text)
    axes.legend(handles=handles, fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.04))


def _plot_similarity(axes: Axes, layers: list[int], result: dict[str, Any]) -> None:
    similarity = result["similarity"]
    axes.plot(layers[1:], similarity["text"], color=COLOURS[2], marker="o", markersize=4, label="mean of the text")
    axes.plot(
        layers[1:],
        similarity["last"],
        color=COLOURS[3],
        marker="s",
        markersize=3.5,
        linestyle=(0, (4, 2)),
        label="last token",
    )
    axes.set_title("How much of the text state stays from the layer before")
    axes.set_ylabel("cosine")
    lowest = min(similarity["text"] + similarity["last"])
    axes.set_ylim(lowest - 0.25 * (1 - lowest), 1 + 0.08 * (1 - lowest))
    axes.legend(fontsize=7.5, loc="best")
