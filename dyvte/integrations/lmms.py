"""What lmms-eval loads: any of its models with exits, ``--model dyvte --model_args base=llava_hf,heads=FOLDER,...``"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

import dyvte
from dyvte.evaluation.prompt_times import PromptTimes
from dyvte.integrations.lmms_record import TaskRecord, joined, table, write

AT_ONCE = 512  # requests; fewer than the prompts that a handle remembers


def manifest() -> ModelManifest:
    """Called while ``lmms_eval.models`` is imported: of that package, this module may import the registry alone."""
    return ModelManifest("dyvte", f"{__name__}.SimpleExits", f"{__name__}.Exits")


class Exits(lmms):
    """What a model of lmms-eval is derived from, beside its own class, to answer with exits.

    Args:
        base: name of the model in lmms-eval, such as ``llava_hf``.
        heads: folder of exit heads or of any promise, see :func:`dyvte.load`; without, the model is dense and timed.
        risk: share of answers that may change; default: what was calibrated for.
        compare: answer everything dense, too, for agreement and time beside it.
        record: JSON file of what the exits did, task by task.
        other_weights: use heads on weights that they were not made for. No promise holds then.
        arguments: the base's own.
    """

    is_simple = False

    def __init__(self, base: str, heads: str | None = None, risk: float | None = None, compare: bool = False,
                 record: str | None = None, other_weights: bool = False, **arguments: Any):  # fmt: skip
        if heads is None and (risk is not None or compare):
            raise ValueError("risk and compare are about exits: give heads=FOLDER, too")
        self._policy = None if heads is None else dyvte.load(heads, risk=risk, other_weights=other_weights)
        self._settings = {"base": base, "heads": heads, "risk": risk, "compare": compare} | arguments
        self._compare, self._record, self._tasks = compare, record, {}
        if record is not None:
            Path(record).parent.mkdir(parents=True, exist_ok=True)
        super().__init__(**arguments)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> lmms:
        from lmms_eval.models import get_model
        from lmms_eval.utils import simple_parse_args_string

        given = simple_parse_args_string(arg_string)
        given |= {name: value for name, value in (additional_config or {}).items() if value is not None}
        if given.get("base") in (None, "dyvte"):
            raise ValueError("--model dyvte needs base=NAME, a model of lmms-eval such as base=llava_hf")
        base = get_model(given["base"], force_simple=cls.is_simple)
        return type(cls.__name__, (cls, base), {"is_simple": base.is_simple, "__module__": __name__})(**given)

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        groups: dict[tuple[str, bool], list[int]] = {}
        for place, request in enumerate(requests):
            padding = "__padding_only__" in request.metadata  # evens out ranks, is no question of its own
            groups.setdefault((request.task_name, padding), []).append(place)
        answers: dict[int, Any] = {}
        for (task, padding), places in groups.items():
            record = TaskRecord() if padding else self._tasks.setdefault(task, TaskRecord())
            for start in range(0, len(places), AT_ONCE):
                chunk = places[start : start + AT_ONCE]
                answers |= zip(chunk, self._answer([requests[place] for place in chunk], record))
        return [answers[place] for place in range(len(requests))]

    def _answer(self, requests: list[Instance], record: TaskRecord) -> list[Any]:
        dense = self._run(requests, None, record, record.dense_seconds) if self._compare else []
        record.samples += len(requests)
        answers = self._run(requests, self._policy, record, record.seconds)
        texts = [[unwrap_generation_output(answer)[0] for answer in run] for run in (dense, answers)]
        if self._compare:
            record.compare([request.doc_id for request in requests], *texts)
        return answers

    def _run(self, requests: list[Instance], policy: Any, record: TaskRecord, seconds: list[float]) -> list[Any]:
        fresh = [copy.copy(request) for request in requests]
        for request in fresh:  # models of lmms-eval change the generation arguments they are given
            request.arguments = tuple(copy.deepcopy(a) if isinstance(a, dict) else a for a in request.args)
        reduced = nullcontext() if policy is None else dyvte.reduce_tokens(self.model, policy)
        with reduced as handle, PromptTimes(self.model) as times:
            answers = super().generate_until(fresh)
        seen = times.prompts if handle is None else sum(len(prompt.layers) for prompt in handle.record)
        if seen != len(requests):
            raise ValueError(
                f"{self._settings['base']} answered {len(requests)} requests with {seen} prompts to its model: it met "
                "an error, which the log above names, or calls the model in a way that exits are not made for"
            )
        seconds += times.seconds
        if handle is not None:
            record.add(handle.record, handle.spec.config)
        return answers

    def _refuse(self, requests: list[Instance]) -> list[Any]:
        raise ValueError("exits are for tasks of output_type generate_until: run others with the base model itself")

    loglikelihood = generate_until_multi_round = generate_visual_cot = _refuse

    def clean(self) -> None:
        """Called once on every rank, after the last request: the ranks' records become one, shown and written."""
        summaries = joined(self._tasks)
        if self.rank == 0:
            print(table(summaries))
            if self._record is not None:
                write(self._record, summaries, self._settings, self.model)
        super().clean()


class SimpleExits(Exits):  # for --force_simple
    is_simple = True
