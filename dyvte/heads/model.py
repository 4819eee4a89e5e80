"""Exit heads: small hyper-networks that read the text state after each decoder layer and say whether to exit now."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dyvte.version import __version__

logger = logging.getLogger(__name__)

FORMS = ("shared", "original")
ALL = slice(None)
LABEL_RULES = ("agreement", "original")
TEXT_STATE = "mean of the text tokens after the last visual token but the last; last prompt token"
ORIGINAL_KEY = "model.visual_gates_router.{layer}.{name}.weight"


def boldest_safe(bound: Sequence[float], alpha: float) -> int | None:
    """The least cautious threshold that keeps the risk below ``alpha``, as an index into a risk curve.

    Thresholds are tested in a fixed order, from the safest on, and the first failure ends it (fixed-sequence testing,
    Learn then Test, arXiv 2110.01052), so the confidence holds without correction for the number of thresholds.

    Args:
        bound: upper confidence bounds of the risk, from the most cautious threshold to the least.

    Returns:
        None if even the safest threshold fails.
    """
    safe = next((i for i, value in enumerate(bound) if value > alpha), len(bound))
    return safe - 1 if safe > 0 else None


class ExitHeadsConfig(PreTrainedConfig):
    """What a reader of a checkpoint of heads must know.

    Args:
        num_layers: decoder layers of the base model, L.
        hidden_size: width d of the base model; a text state is 2 * d wide.
        form: "shared" (a norm per layer, one narrow trunk for all layers) or "original" (DyVTE, arXiv 2411.19628:
            Linear(2d, width) -> GELU -> Linear(width, 2) per layer, no biases).
        width: inner width; 128 for "shared", 2048 in the original.
        base_model, base_revision: the model the heads were trained for, by hub id or path, and its revision.
        text_state: the recipe of the text state.
        label_rule: what "the visual tokens can leave" meant in training, see :func:`dyvte.training.fit.exit_labels`.
        threshold: probability that must be exceeded to exit.
        min_layer: the smallest exit layer the base model allows (more than 1 where visual features enter later layers).
        lookahead: exit layer e is decided from the text state after e - lookahead layers; 0 in the papers. With 1 the
            decision travels to the host while the layer before the exit runs, so that a GPU need not wait for it.
        guard: share of usual samples that the guard lets pass, at each layer by their text state and once by their
            image; None: there is no guard. What is unlike training does not exit, since no promise covers it.
        calibration: how the threshold was chosen, with the risk it keeps; empty if by no rule.
        training: data, settings and figures of the training run.
        dyvte_version: version that made the checkpoint.
    """

    model_type = "dyvte_exit_heads"

    num_layers: int = 1
    hidden_size: int = 1
    form: str = "shared"
    width: int = 128
    base_model: str | None = None
    base_revision: str | None = None
    text_state: str = TEXT_STATE
    label_rule: str = "agreement"
    threshold: float = 0.5
    min_layer: int = 1
    lookahead: int = 0
    guard: float | None = None
    calibration: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    dyvte_version: str | None = None

    def __post_init__(self, **kwargs: Any):
        # Written by transformers itself, not fields of this config.
        unknown = set(kwargs) - {"model_type", "auto_map", "torch_dtype", "transformers_version"}
        unknown = sorted(key for key in unknown if not key.startswith("_"))
        if unknown:
            logger.warning("ignoring unknown keys in the config of exit heads: %s", ", ".join(unknown))
        super().__post_init__(**{key: value for key, value in kwargs.items() if key not in unknown})
        if self.form not in FORMS:
            raise ValueError(f"unknown form of exit heads {self.form!r}: choose one of {', '.join(FORMS)}")
        if self.label_rule not in LABEL_RULES:
            raise ValueError(f"unknown label rule {self.label_rule!r}: choose one of {', '.join(LABEL_RULES)}")
        if self.text_state != TEXT_STATE:
            raise ValueError(
                f"these heads read another text state ({self.text_state!r}) than this version of dyvte gives "
                f"({TEXT_STATE!r}): use the version that made them ({self.dyvte_version})"
            )
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], not {self.threshold}")
        if not 0 <= self.lookahead <= max(self.num_layers - 2, 0):
            raise ValueError(f"lookahead must be 0 ... {max(self.num_layers - 2, 0)} layers, not {self.lookahead}")
        if self.guard is not None and not 0 < self.guard < 1:
            raise ValueError(f"guard must lie strictly between 0 and 1, or be None, not {self.guard}")
        for name in ("num_layers", "hidden_size", "width", "min_layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.dyvte_version is None:
            self.dyvte_version = __version__


class _SharedHead(nn.Module):
    """A LayerNorm per layer, then one projection, a layer embedding and a small MLP that all layers share."""

    def __init__(self, config: ExitHeadsConfig):
        super().__init__()
        layers, size, width = config.num_layers, config.hidden_size, config.width
        self.size = size
        self.norm_weight = nn.Parameter(torch.ones(layers, 2 * size))
        self.norm_bias = nn.Parameter(torch.zeros(layers, 2 * size))
        self.project = nn.Linear(2 * size, width)
        self.layer = nn.Parameter(torch.zeros(layers, width))
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def features(self, state: torch.Tensor, layers: slice) -> torch.Tensor:
        """[..., layers, 2d] -> [..., layers, width], linear in the normalised state."""
        # The two halves are normalised apart: a mean over tokens is shorter than the state of one token.
        halves = state.unflatten(-1, (2, self.size))
        normal = F.layer_norm(halves, (self.size,)).flatten(-2)
        return self.project(torch.addcmul(self.norm_bias[layers], normal, self.norm_weight[layers]))

    def decide(self, features: torch.Tensor, layers: slice) -> torch.Tensor:
        return self.out(F.gelu(self.hidden(F.gelu(features + self.layer[layers])))).squeeze(-1)


class _OriginalHead(nn.Module):
    """The published form: per layer w2(GELU(w1 x)), without biases; its margin logit 1 - logit 0 is the logit."""

    def __init__(self, config: ExitHeadsConfig):
        super().__init__()
        layers, size, width = config.num_layers, config.hidden_size, config.width
        self.w1 = nn.Parameter(torch.empty(layers, width, 2 * size))
        self.w2 = nn.Parameter(torch.empty(layers, 2, width))
        for weight in (self.w1, self.w2):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def features(self, state: torch.Tensor, layers: slice) -> torch.Tensor:
        return torch.einsum("...ld,lwd->...lw", state, self.w1[layers])

    def decide(self, features: torch.Tensor, layers: slice) -> torch.Tensor:
        logits = torch.einsum("...lw,low->...lo", F.gelu(features), self.w2[layers])
        return logits[..., 1] - logits[..., 0]


class _Guard(nn.Module):
    """Knows which samples are like those of training, by Mahalanobis distances.

    Two of them: of the text state after each layer, in the heads' features, which tells unusual questions; and of the
    mean visual token before the first layer, in its principal directions, which tells unusual images.
    """

    def __init__(self, config: ExitHeadsConfig):
        super().__init__()
        layers, width, size = config.num_layers, config.width, config.hidden_size

        def fixed(*shape: int, value: float = 0.0) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value), requires_grad=False)

        self.mean, self.whiten = fixed(layers, width), fixed(layers, width, width)
        self.radius = fixed(layers, value=math.inf)
        self.image_mean, self.image_whiten = fixed(size), fixed(min(size, width), size)
        self.image_radius = fixed(1, value=math.inf)

    def unusual(self, features: torch.Tensor, layers: slice) -> torch.Tensor:
        """Text states of some layers, as the heads' features: [..., layers, width] -> bool [..., layers]."""
        return self._distance(features, layers) > self.radius[layers]

    def unusual_image(self, visual: torch.Tensor) -> torch.Tensor:
        """Mean visual tokens: [n, hidden size] -> bool [n]."""
        return self._image_distance(visual) > self.image_radius

    def _distance(self, features: torch.Tensor, layers: slice) -> torch.Tensor:
        apart = features - self.mean[layers]
        return torch.einsum("lvw,...lw->...lv", self.whiten[layers], apart).square().sum(-1)

    def _image_distance(self, visual: torch.Tensor) -> torch.Tensor:
        return ((visual - self.image_mean) @ self.image_whiten.T).square().sum(-1)

    @torch.no_grad()
    def fit(self, training: Sequence[torch.Tensor], held_out: Sequence[torch.Tensor], quantile: float) -> None:
        """Mean and spread from one set of samples, the radii that keep ``quantile`` of another.

        Args:
            training, held_out: the heads' features [n, L, width] and the mean visual tokens [n, hidden size].
        """
        features, visual = training
        for i in range(features.shape[1]):
            self.mean[i], self.whiten[i] = _whitening(features[:, i], features.shape[2])
        self.radius.copy_(self._distance(held_out[0], ALL).quantile(quantile, 0))
        mean, whiten = _whitening(visual, len(self.image_whiten))
        self.image_mean.copy_(mean)
        self.image_whiten.copy_(whiten)
        self.image_radius.copy_(self._image_distance(held_out[1]).quantile(quantile))


def _whitening(samples: torch.Tensor, directions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [d] and the map [directions, d] to principal directions of variance one, of samples [n, d]."""
    mean = samples.mean(0)
    apart = (samples - mean).double()
    variance, basis = torch.linalg.eigh(apart.T @ apart / len(samples))
    # A little of the mean variance everywhere: a direction never seen in training must not count as infinite.
    scale = (variance.clamp(min=0) + 1e-3 * variance.mean()).rsqrt()
    return mean, (basis * scale).T.flip(0)[:directions].to(samples.dtype)


class ExitHeads(PreTrainedModel):
    """One decision per exit layer: is the answer the same if the visual tokens leave here?

    Trained by :mod:`dyvte.training.fit` from traces of a frozen model; saved and loaded like any model of transformers.
    """

    config_class = ExitHeadsConfig
    base_model_prefix = "heads"
    main_input_name = "state"

    def __init__(self, config: ExitHeadsConfig):
        super().__init__(config)
        self.heads = {"shared": _SharedHead, "original": _OriginalHead}[config.form](config)
        self.guard = None if config.guard is None else _Guard(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The heads initialise themselves when they are made; loading never leaves a weight to initialise."""

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Logits of "the visual tokens can leave".

        Args:
            state: [..., L, 2 * hidden_size], the text states after every layer.

        Returns:
            float32 [..., L]; column e - 1 decides exit layer e. The last one means nothing: e = L is no exit. The
            first ``lookahead`` ones are -inf: there is no state to decide them from.
        """
        return self._logits(self.features(state))

    def guarded_logits(self, state: torch.Tensor) -> torch.Tensor:
        """Like :meth:`forward`, but -inf where the guard finds a text state unlike those of training."""
        features = self.features(state)
        logits = self._logits(features)
        return logits if self.guard is None else logits.masked_fill(self.guard.unusual(features, ALL), -math.inf)

    def features(self, state: torch.Tensor) -> torch.Tensor:
        """What the decisions are made from, and where the guard measures distances: [..., L, 2d] -> [..., L, width]."""
        return self.heads.features(state.float().roll(self.config.lookahead, -2), ALL)

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        too_early = torch.arange(features.shape[-2], device=features.device) < self.config.lookahead
        return self.heads.decide(features, ALL).masked_fill(too_early, -math.inf)

    def confident(self, state: torch.Tensor, layer: int, threshold: float) -> torch.Tensor:
        """Whether the probability exceeds ``threshold`` at exit layer ``layer``, and the guard finds nothing unusual.

        Args:
            state: [n, 2 * hidden_size], the text states after ``layer - lookahead`` layers, where the heads are.

        Returns:
            bool [n]
        """
        bar = math.inf if threshold == 1 else math.log(threshold) - math.log1p(-threshold)
        one = slice(layer - 1, layer)
        features = self.heads.features(state.float()[:, None], one)
        confident = self.heads.decide(features, one) > bar
        # On a CPU, where to look costs nothing, the guard is asked only when there is something to guard.
        if self.guard is not None and (confident.device.type != "cpu" or confident.any()):
            confident = confident & ~self.guard.unusual(features, one)
        return confident.squeeze(1)

    def threshold_for(self, risk: float) -> float:
        """The threshold that changes at most ``risk`` of the answers, from the curve the calibration left.

        Raises:
            ValueError: the heads were never calibrated, or not on enough samples for such a risk.
        """
        calibration = self.config.calibration or {}
        curve = calibration.get("curve")
        if curve is None:
            raise ValueError("these heads carry no risk curve: run `dyvte calibrate`, or give a threshold")
        if isinstance(risk, bool) or not isinstance(risk, (int, float)) or not 0 < risk < 1:
            raise ValueError(f"risk must lie strictly between 0 and 1, not {risk}: it is a share of changed answers")
        chosen = boldest_safe(curve["bound"], risk)
        if chosen is None:
            raise ValueError(
                f"{calibration['samples']} calibration samples cannot show a risk as low as {risk}: "
                f"the least is {curve['bound'][0]:.4g}; calibrate on more samples"
            )
        return curve["threshold"][chosen]

    def usual_images(self, visual: torch.Tensor) -> torch.Tensor | None:
        """Which mean visual tokens [n, hidden_size] are like those of training: bool [n]; None: no guard."""
        if self.guard is None:
            return None
        return ~self.guard.unusual_image(visual.float())

    def check_fits(self, num_layers: int, hidden_size: int, name_or_path: str | None = None) -> None:
        """Raises ``ValueError`` if the heads were made for a decoder of another shape or for another model."""
        config = self.config
        if (num_layers, hidden_size) != (config.num_layers, config.hidden_size):
            raise ValueError(
                f"these heads fit a decoder of {config.num_layers} layers, {config.hidden_size} wide "
                f"({config.base_model or 'base model not recorded'}); this model has {num_layers} layers, "
                f"{hidden_size} wide: load the heads trained for it, or train some with `dyvte trace` and `dyvte train`"
            )
        if config.base_model and name_or_path:
            expected, given = (Path(name.rstrip("/")).name for name in (config.base_model, name_or_path))
            if expected != given:
                raise ValueError(
                    f"these heads were trained for {config.base_model}, not for {name_or_path}: load heads trained for "
                    "it. If both are the same weights under two names, set heads.config.base_model = None"
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> ExitHeads:
        """As in transformers, but strict: missing, unexpected or misshapen weights are a ``ValueError``."""
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs = {"use_safetensors": True} | kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
        heads, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        faults = [
            f"{what}: {', '.join(sorted(str(key) for key in info[name]))}"
            for what, name in (
                ("missing weights", "missing_keys"),
                ("unexpected weights", "unexpected_keys"),
                ("weights of another shape", "mismatched_keys"),
            )
            if info[name]
        ]
        if faults:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not hold the heads its config describes; {'; '.join(faults)}"
            )
        return (heads, info) if wants_info else heads

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes config.json, model.safetensors and a model card, README.md."""
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, "README.md").write_text(model_card(self), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes, its model card included; returns the address of the commit."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload exit heads",
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_original(cls, state_dict: dict[str, torch.Tensor], **config: Any) -> ExitHeads:
        """Heads from gate weights that the original DyVTE code trained.

        Args:
            state_dict: ``model.visual_gates_router.{i}.w1.weight`` [width, 2d] and ``.w2.weight`` [2, width] for every
                layer i; gate i decides exit layer i + 1. Other keys are not looked at.
            config: further fields of :class:`ExitHeadsConfig`, such as ``base_model``.

        Raises:
            ValueError: gates are missing or differ in shape.
        """
        layers = 0
        while ORIGINAL_KEY.format(layer=layers, name="w1") in state_dict:
            layers += 1
        names = [ORIGINAL_KEY.format(layer=i, name=name) for i in range(layers) for name in ("w1", "w2")]
        missing = [name for name in names if name not in state_dict]
        if layers == 0 or missing:
            missing = missing or [ORIGINAL_KEY.format(layer=0, name="w1")]
            raise ValueError(
                f"the gates of the original code are missing: {', '.join(missing)}; "
                "pass the state dict that its training saved"
            )
        w1, w2 = (
            [state_dict[ORIGINAL_KEY.format(layer=i, name=name)].float() for i in range(layers)]
            for name in ("w1", "w2")
        )
        width, size = w1[0].shape
        for i in range(layers):
            if w1[i].shape != (width, size) or w2[i].shape != (2, width) or size % 2:
                raise ValueError(
                    f"gate {i} has shapes {list(w1[i].shape)} and {list(w2[i].shape)}; expected w1 [width, 2d] and "
                    f"w2 [2, width], the same in every layer"
                )
        settings = {"form": "original", "label_rule": "original", "threshold": 0.5} | config
        heads = cls(ExitHeadsConfig(num_layers=layers, hidden_size=size // 2, width=width, **settings))
        heads.heads.load_state_dict({"w1": torch.stack(w1), "w2": torch.stack(w2)})
        return heads.eval()


def model_card(heads: ExitHeads) -> str:
    """The README.md of a checkpoint: what it is for, how to use it, how it was made."""
    config = heads.config
    base = config.base_model or "an unrecorded base model"
    parameters = sum(p.numel() for p in heads.parameters())
    lines = [
        "---",
        "library_name: dyvte",
        "tags: [dyvte, visual-token-exit]",
        *([f"base_model: {config.base_model}"] if config.base_model else []),
        "---",
        f"# Exit heads for {base}",
        "",
        f"{parameters:,} parameters that read the text state after each of the {config.num_layers} decoder layers and "
        "decide, per sample, when the visual tokens can leave. The base model stays as it is.",
        "",
        "```python",
        "import dyvte",
        "",
        'heads = dyvte.ExitHeads.from_pretrained("path/to/this/checkpoint")',
        "with dyvte.visual_exit(model, dyvte.LearnedExit(heads)) as exits:",
        "    output = model.generate(**inputs)",
        "exits.layers  # the exit layer of each sample",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base} (revision {config.base_revision or 'not recorded'}) |",
        f"| form | {config.form}, width {config.width} |",
        f"| text state | {config.text_state} |",
        f"| lookahead | {config.lookahead} |",
        f"| label rule | {config.label_rule} |",
        f"| threshold | {config.threshold:.6g} |",
        f"| guard | {'none' if config.guard is None else f'{config.guard:g} of usual samples pass'} |",
        f"| dyvte | {config.dyvte_version} |",
    ]
    for title, values in (("How the threshold was chosen", config.calibration), ("Training", config.training)):
        shown = {k: v for k, v in (values or {}).items() if isinstance(v, (str, int, float))}
        if shown:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [
                f"| {key} | {value:.6g} |" if isinstance(value, float) else f"| {key} | {value} |"
                for key, value in shown.items()
            ]
    return "\n".join(lines) + "\n"
