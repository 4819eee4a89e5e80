"""What vLLM loads: with DYVTE_HEADS set, an engine is configured for exits or refused, and its model gets them."""

from __future__ import annotations

import os
from operator import attrgetter
from typing import Any

import torch
import vllm
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import cached_file
from vllm.config import CompilationConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.v1.worker.worker_base import WorkerWrapperBase

from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.methods import LearnedExit
from dyvte.runtime.decoder import DecoderSpec

VERSION = "0.32"  # whose internals this is written for
# Field of VllmConfig, what is wrong with it, what to use instead.
REFUSED = (
    ("cache_config.enable_prefix_caching", "prefix caching: blocks hold one exit's tokens", "no-enable-prefix-caching"),
    ("scheduler_config.enable_chunked_prefill", "chunked prefill: heads read all text", "no-enable-chunked-prefill"),
    ("parallel_config.pipeline_parallel_size", "pipeline parallelism: stages pass all rows", "tensor-parallel-size"),
    ("parallel_config.decode_context_parallel_size", "context parallelism: prompts are split", "tensor-parallel-size"),
    ("parallel_config.data_parallel_size", "data parallelism: ranks agree on rows", "port, a server for each replica"),
    ("parallel_config.use_ubatching", "two micro-batches at once: they share rows", "no-enable-dbo"),
    ("speculative_config", "speculative decoding: drafts count all tokens", "speculative-config null"),
    ("lora_config", "LoRA adapters: they count all rows", "no-enable-lora and merged weights"),
    ("kv_transfer_config", "KV transfer: other engines expect all tokens", "kv-transfer-config null"),
    ("model_config.pooler_config", "pooling: it reads all rows", "runner generate"),
)
OTHER_NUMBERS = (
    ("model_config.quantization", "quantised weights: heads are for others", "quantization null"),
    ("cache_config.cache_dtype", "quantised keys: heads are for others", "kv-cache-dtype auto"),
)


def install() -> None:
    """Wraps how vLLM makes its configuration and its workers; called once in every process of vLLM.

    Raises:
        ValueError: another version of vLLM.
    """
    if not vllm.__version__.startswith(f"{VERSION}."):
        raise ValueError(
            f"exits reach into vLLM and are tested with {VERSION}, not {vllm.__version__}: "
            f"pip install 'vllm=={VERSION}.*', or unset DYVTE_HEADS"
        )
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    create, initialize = EngineArgs.create_engine_config, WorkerWrapperBase.initialize_from_config

    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        policy_arguments()
        for name in ("enable_prefix_caching", "enable_chunked_prefill"):  # where the user has said nothing
            setattr(self, name, bool(getattr(self, name)))
        self.enforce_eager |= self.compilation_config == CompilationConfig()
        config = create(self, *args, **kwargs)
        refuse(config)
        return config

    def initialize_from_config(self: WorkerWrapperBase, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        attach(self.worker.model_runner)

    EngineArgs.create_engine_config = create_engine_config
    WorkerWrapperBase.initialize_from_config = initialize_from_config


def refuse(config: VllmConfig) -> None:
    """Raises ``ValueError`` for a configuration under which answers with exits are not known to be right."""
    fields = REFUSED if policy_arguments()["other_weights"] else REFUSED + OTHER_NUMBERS
    found = [(attrgetter(field)(config), what, remedy) for field, what, remedy in fields]
    # One rank is fine, True is not, and they are equal.
    faults = [f"{what} (--{remedy})" for on, what, remedy in found if on is True or on not in (None, False, 1, "auto")]
    if not config.model_config.enforce_eager:
        faults.append("CUDA graphs and compilation: layers lose rows while they run (--enforce-eager)")
    if config.use_v2_model_runner:
        faults.append("the second model runner (VLLM_USE_V2_MODEL_RUNNER=0)")
    if faults:
        raise ValueError("exits do not work with " + "; nor with ".join(faults))


def policy_arguments() -> dict[str, Any]:
    """Arguments of :class:`~dyvte.LearnedExit` that environment variables give.

    Raises:
        ValueError: they are no numbers, there are no heads, or these were not calibrated for such a risk.
    """
    folder, risk = os.environ["DYVTE_HEADS"], os.environ.get("DYVTE_RISK") or None
    try:
        risk = None if risk is None else float(risk)
        other = bool(int(os.environ.get("DYVTE_OTHER_WEIGHTS") or 0))
    except ValueError as error:
        raise ValueError(f"DYVTE_RISK is a share such as 0.01, DYVTE_OTHER_WEIGHTS 0 or 1: {error}") from error
    try:
        if cached_file(folder, "config.json") is None:  # not an error to transformers
            raise OSError("there is no config.json")
        config = ExitHeadsConfig.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"DYVTE_HEADS={folder} has no exit heads, as `dyvte train` writes them: {error}") from error
    if risk is not None:
        with torch.device("meta"):
            ExitHeads(config).threshold_for(risk)
    return {"risk": risk, "other_weights": other}


def attach(runner: Any) -> None:
    """Gives exits to the model runner of a worker whose model and cache are there.

    Raises:
        ValueError: heads and model do not fit, or the configuration is refused.
    """
    from dyvte.integrations.vllm.exits import Exits  # vLLM's models: for workers only

    refuse(runner.vllm_config)
    model, heads = runner.model_config, ExitHeads.from_pretrained(os.environ["DYVTE_HEADS"])
    policy = LearnedExit(heads, **policy_arguments())
    given = {"revision": model.revision, "trust_remote_code": model.trust_remote_code, "dtype": model.dtype}
    first = get_tensor_model_parallel_rank() == 0
    if first and not policy.other_weights and "weights" in (heads.config.identity or {}):
        twin = AutoModelForImageTextToText.from_pretrained(model.model, **given)
    else:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(model.model, **given)
            twin = AutoModelForImageTextToText.from_config(config)
    spec = DecoderSpec.of(twin)  # what transformers makes of the model, which the heads were made for
    if first:
        policy.check(spec)
    Exits(runner, policy, spec.exits)
    init_logger("vllm.dyvte").info(
        "Exits: threshold %.4g, %s of %d layers.", policy.threshold, spec.exits, spec.num_layers
    )
