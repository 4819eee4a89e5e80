"""The config of exit heads: what a reader of a checkpoint must know."""

from __future__ import annotations

import logging
from typing import Any

from dyvte.promise import Promise
from dyvte.runtime.compat import PreTrainedConfig
from dyvte.version import __version__

logger = logging.getLogger(__name__)

FORMS = ("shared", "original")
LABEL_RULES = ("agreement", "original")
TEXT_STATE = "mean of the text tokens after the last visual token but the last; last prompt token"

# What one version of transformers or another adds to a config that it loads.
HANDED_ON = ("attn_implementation", "experts_implementation", "auto_map", "name_or_path", "torch_dtype")

# Where transformers finds these classes in a repository of heads as long as dyvte is not imported.
AUTO_MAP = {"AutoConfig": "modeling_exit_heads.ExitHeadsConfig", "AutoModel": "modeling_exit_heads.ExitHeads"}


class ExitHeadsConfig(PreTrainedConfig):
    """What a reader of a checkpoint of heads must know.

    Args:
        num_layers: decoder layers of the base model, L.
        hidden_size: width d of the base model; a text state is 2 * d wide.
        form: "shared" (:class:`dyvte.heads.shared.SharedHead`) or "original", the published one
            (:class:`dyvte.heads.published.PublishedHead`).
        width: inner width; 128 for "shared", 2048 in the original.
        license: licence of the heads, by the hub's name for it such as apache-2.0, for their card; None: not stated.
        base_model, base_revision: the model the heads were trained for, by hub id or path, and its revision.
        identity: what was traced: ``weights`` (:func:`dyvte.identity.model_fingerprint`), ``processor``, ``dtype`` and
            ``attention``; None where it was not recorded.
        text_state: the recipe of the text state.
        label_rule: what "the visual tokens can leave" meant in training, see :func:`dyvte.training.fit.exit_labels`.
        threshold: probability that must be exceeded to exit.
        min_layer: the smallest exit layer the base model allows (more than 1 where visual features enter later layers).
        exits: the exit layers that were traced, the only ones that can be chosen; None: all.
        lookahead: exit layer e is decided from the text state after e - lookahead layers; 0 in the papers. With 1 the
            decision travels to the host while the layer before the exit runs, so that a GPU need not wait for it.
        guard: share of usual samples that the guard lets pass, at each layer by their text state and once by their
            image; None: there is no guard. What is unlike training does not exit, since no promise covers it.
        calibration: the record of the promise that the threshold keeps, see :attr:`promise`; None: there is none.
        training: data, settings and figures of the training run.
        dyvte_version: version that made the checkpoint.

    Raises:
        ValueError: a value that no heads can have. Unknown keys are ignored with a warning.
    """

    model_type = "dyvte_exit_heads"

    num_layers: int = 1
    hidden_size: int = 1
    form: str = "shared"
    width: int = 128
    license: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    identity: dict[str, str] | None = None
    text_state: str = TEXT_STATE
    label_rule: str = "agreement"
    threshold: float = 0.5
    min_layer: int = 1
    exits: list[int] | None = None
    lookahead: int = 0
    guard: float | None = None
    calibration: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    dyvte_version: str | None = None

    def __init__(self, **values: Any):
        # The base class is a dataclass in some versions of transformers and a plain class in others: this fits both.
        for name in ExitHeadsConfig.__annotations__:
            setattr(self, name, values.pop(name, getattr(ExitHeadsConfig, name)))
        known = {*PreTrainedConfig().to_dict(), *HANDED_ON}
        unknown = sorted(key for key in values if key not in known and not key.startswith("_"))
        if unknown:
            logger.warning("ignoring unknown keys in the config of exit heads: %s", ", ".join(unknown))
        super().__init__(**{key: value for key, value in values.items() if key not in unknown} | {"auto_map": AUTO_MAP})
        self._check()
        if self.dyvte_version is None:
            self.dyvte_version = __version__

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: a checkpoint names the classes of this package, and no source is copied into it."""

    @property
    def decided(self) -> list[int]:
        """The exit layers that the heads decide."""
        exits = range(1, self.num_layers) if self.exits is None else self.exits
        return [e for e in exits if e > self.lookahead]

    @property
    def promise(self) -> Promise | None:
        """The promise that the threshold keeps; None: there is none."""
        return None if self.calibration is None else Promise.from_dict(self.calibration)

    def _check(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"unknown form of exit heads {self.form!r}: choose one of {', '.join(FORMS)}")
        if self.label_rule not in LABEL_RULES:
            raise ValueError(f"unknown label rule {self.label_rule!r}: choose one of {', '.join(LABEL_RULES)}")
        if self.text_state != TEXT_STATE:
            raise ValueError(
                f"these heads read another text state ({self.text_state!r}) than this version of dyvte gives "
                f"({TEXT_STATE!r}): use the version that made them ({self.dyvte_version})"
            )
        promise = self.promise
        if promise is not None and promise.setting != {"learned.threshold": self.threshold}:
            raise ValueError(
                f"threshold {self.threshold} is not the one that was promised, {promise.setting}: calibrate again, or "
                "leave the config as it is and give LearnedExit the threshold"
            )
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], not {self.threshold}")
        if not 0 <= self.lookahead <= max(self.num_layers - 2, 0):
            raise ValueError(f"lookahead must be 0 ... {max(self.num_layers - 2, 0)} layers, not {self.lookahead}")
        if self.guard is not None and not 0 < self.guard < 1:
            raise ValueError(f"guard must lie strictly between 0 and 1, or be None, not {self.guard}")
        if self.exits is not None and not set(self.exits) <= set(range(1, self.num_layers)):
            raise ValueError(f"exits must be exit layers 1 ... {self.num_layers - 1}, not {self.exits}")
        for name in ("num_layers", "hidden_size", "width", "min_layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
