"""Exit heads: small hyper-networks that read the text state after each decoder layer and say whether to exit now."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import deepspeed

from dyvte.heads.config import ExitHeadsConfig
from dyvte.heads.guard import ALL_LAYERS, Guard
from dyvte.heads.published import PublishedHead, read_gates
from dyvte.heads.repository import belongs, upload, write_beside
from dyvte.heads.samples import Samples, read_samples
from dyvte.heads.shared import SharedHead
from dyvte.provenance import atomic_folder


@contextmanager
def _without_zero3() -> Iterator[None]:
    """While a DeepSpeed config is alive, transformers would leave every rank a part of what it loads."""
    known = deepspeed._hf_deepspeed_config_weak_ref
    alive = known() if known is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if alive is not None:
            deepspeed.set_hf_deepspeed_config(alive)


class ExitHeads(PreTrainedModel):
    """One decision per exit layer: is the answer the same if the visual tokens leave here?

    Trained by :mod:`dyvte.training.fit` from traces of a frozen model; saved and loaded like any model of transformers.

    Attributes:
        trained_on: what is remembered of the training samples, see :mod:`dyvte.heads.samples`; None: nothing.
    """

    config_class = ExitHeadsConfig
    base_model_prefix = "heads"
    main_input_name = "state"

    def __init__(self, config: ExitHeadsConfig):
        super().__init__(config)
        self.heads = {"shared": SharedHead, "original": PublishedHead}[config.form](config)
        self.guard = None if config.guard is None else Guard(config)
        self.trained_on: Samples | None = None
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
        return logits if self.guard is None else logits.masked_fill(self.guard.unusual(features, ALL_LAYERS), -math.inf)

    def features(self, state: torch.Tensor) -> torch.Tensor:
        """What the decisions are made from, and where the guard measures distances: [..., L, 2d] -> [..., L, width]."""
        return self.heads.features(state.float().roll(self.config.lookahead, -2), ALL_LAYERS)

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        too_early = torch.arange(features.shape[-2], device=features.device) < self.config.lookahead
        return self.heads.decide(features, ALL_LAYERS).masked_fill(too_early, -math.inf)

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
        promise = self.config.promise
        if promise is None:
            raise ValueError("these heads carry no risk curve: run `dyvte calibrate`, or give a threshold")
        return promise.with_risk(risk).setting["learned.threshold"]

    def usual_images(self, visual: torch.Tensor) -> torch.Tensor | None:
        """Which mean visual tokens [n, hidden_size] are like those of training: bool [n]; None: no guard."""
        return None if self.guard is None else ~self.guard.unusual_image(visual.float())

    def check_fits(
        self, num_layers: int, hidden_size: int, name_or_path: str | None = None, weights: str | None = None
    ) -> None:
        """Raises ``ValueError`` if the heads were made for a decoder of another shape or for another model.

        Args:
            weights: the model's :func:`~dyvte.identity.model_fingerprint`. Where it is not known, or was not when the
                heads were made, models are told apart by the last part of their names.
        """
        config = self.config
        if (num_layers, hidden_size) != (config.num_layers, config.hidden_size):
            raise ValueError(
                f"these heads fit a decoder of {config.num_layers} layers, {config.hidden_size} wide "
                f"({config.base_model or 'base model not recorded'}); this model has {num_layers} layers, "
                f"{hidden_size} wide: load the heads trained for it, or train some with `dyvte trace` and `dyvte train`"
            )
        identity = config.identity or {}
        if weights and "weights" in identity:
            if weights != identity["weights"]:
                raise ValueError(
                    f"these heads were made for other weights ({config.base_model} in {identity.get('dtype')}, "
                    f"{identity['weights'][:12]}) than those of {name_or_path} ({weights[:12]}): load the model in "
                    "that dtype, with the same adapters and quantisation, or train heads for it. "
                    "LearnedExit(heads, other_weights=True) uses them all the same; then no promise holds"
                )
        elif config.base_model and name_or_path:
            expected, given = (Path(name.rstrip("/")).name for name in (config.base_model, name_or_path))
            if expected != given:
                raise ValueError(
                    f"these heads were trained for {config.base_model}, not for {name_or_path}: load heads trained for "
                    "it. If both are the same weights under two names, set heads.config.base_model = None"
                )

    def check_whole(self) -> None:
        """Raises ``ValueError`` if weights are partly or wholly elsewhere: on other ranks, or nowhere yet."""
        for name, weight in self.named_parameters():
            if weight.is_meta or hasattr(weight, "ds_id") or hasattr(weight, "device_mesh"):
                raise ValueError(
                    f"weights of these exit heads are not here as a whole ({name}), but every rank decides by itself: "
                    "keep them out of zero.Init and fully_shard, and load them with ExitHeads.from_pretrained"
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> ExitHeads:
        """As in transformers, but strict: missing, unexpected or misshapen weights are a ``ValueError``.

        The heads are whole on every rank, also where transformers would partition them (ZeRO-3).
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs = {"use_safetensors": True} | kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with _without_zero3():
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
        heads.trained_on = read_samples(pretrained_model_name_or_path)
        return (heads, info) if wants_info else heads

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes config.json, model.safetensors, what is remembered of training, a model card, README.md, and the code
        by which transformers finds the heads (``auto_map``) and generates with them (``custom_generate``).

        All of them take the place of those of other heads in one step; whatever else is in the folder stays.
        """
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with atomic_folder(save_directory, belongs) as fresh:
            super().save_pretrained(fresh, *args, **kwargs)
            write_beside(fresh, self.config, sum(p.numel() for p in self.parameters()), self.trained_on)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: a checkpoint names the classes of this package, and no source is copied into it."""

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
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, commit_message, private, token, revision, create_pr)

    @classmethod
    def from_original(cls, state_dict: Mapping[str, torch.Tensor], **config: Any) -> ExitHeads:
        """Heads from gate weights that the original DyVTE code trained.

        Args:
            state_dict: ``model.visual_gates_router.{i}.w1.weight`` [width, 2d] and ``.w2.weight`` [2, width] for every
                layer i; gate i decides exit layer i + 1. Other keys are not looked at.
            config: further fields of :class:`ExitHeadsConfig`, such as ``base_model``.

        Raises:
            ValueError: gates are missing or differ in shape.
        """
        gates = read_gates(state_dict)
        layers, width, size = gates["w1"].shape
        settings = {"form": "original", "label_rule": "original", "threshold": 0.5} | config
        heads = cls(ExitHeadsConfig(num_layers=layers, hidden_size=size // 2, width=width, **settings))
        heads.heads.load_state_dict(gates)
        return heads.eval()
