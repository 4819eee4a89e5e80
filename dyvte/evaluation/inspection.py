"""What a model does, layer by layer: who its text attends to, what leaving would change, how fast the text changes.

Three views side by side make the stages visible that DyVTE (arXiv 2411.19628) found: text first takes in the image
(early fusion), then mostly reads text (intra-modality modelling), then puts both together (multimodal reasoning),
after which the visual tokens are no longer needed. :func:`inspect_model` writes a folder:

    inspect.json    the numbers, over all samples and per kind of question
    inspect.png     the figure
    traces/         the traces behind it, see :mod:`dyvte.training.store`
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from dyvte.data import Sample, batches, encode
from dyvte.evaluation.attention_shares import READERS, SEEN, attention_shares
from dyvte.evaluation.inspection_figure import SAFE, plot_layers
from dyvte.evaluation.store import samples_fingerprint
from dyvte.provenance import hardware, versions, weights_fingerprint, write_json
from dyvte.report.style import STYLE
from dyvte.runtime.attention import find_attention
from dyvte.runtime.locate import find_decoder, underlying_model
from dyvte.training.store import TraceSet, load_traces
from dyvte.training.write import write_traces


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
        samples: questions about images, see :mod:`dyvte.data`.
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
    made_from = {
        "weights": weights_fingerprint(model),
        "questions": samples_fingerprint(samples),
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
    traces = traces.select(range(len(traces)))
    name = getattr(base.config, "_name_or_path", "") or None
    result = {"model": Path(name).name if name else type(base).__name__, "layers": traces.num_layers}
    result |= summarise(traces, torch.cat(shares), torch.cat(tokens))
    result |= {"config": dict(config or {}), "hardware": hardware(model), "versions": versions()}
    write_json(output / "inspect.json", result)
    with matplotlib.rc_context(STYLE):
        plot_layers(result, title).savefig(output / "inspect.png")
    return result


def summarise(traces: TraceSet, share: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
    """Means over samples by layer, over all and per kind.

    Args:
        traces: n samples in L layers.
        share: [n, L, 2, 3], see :class:`dyvte.evaluation.attention_shares.Shares`.
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
