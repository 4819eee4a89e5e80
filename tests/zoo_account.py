"""What dyvte does on every image-text-to-text type of transformers, seen on tiny random models.

``python tests/zoo_account.py`` writes the account to ``tests/zoo.json`` and, as a table, to ``docs/models.md``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from zoo_fixes import FIXES
from zoo_oracle import masked, sizes, text_rows_alone
from zoo_prompts import Piece, extend, inputs, visual

import dyvte

STEPS = 4  # the token after the prompt, and three steps of decoding
RECORD = Path(__file__).with_name("zoo.json")
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- the account: python tests/zoo_account.py -->", "<!-- end of the account -->"


@dataclasses.dataclass
class Account:
    """How a type fares.

    Attributes:
        outcome: "exact", "refused", "no decoder-only prompt", or "wrong".
        why: what dyvte said, or what was wrong.
        smallest_exit: the handle's ``min_layer``.
        needs: what has to be passed beside the model and its inputs.
    """

    outcome: str
    why: str = ""
    smallest_exit: int | None = None
    needs: str = ""

    def entry(self) -> dict[str, Any]:
        """What the record holds of it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


class Mismatch(Exception):
    """dyvte's numbers are not those of the definition."""


class Subject:
    """One type: its model as users run it, the same weights for the definition, and prompts."""

    def __init__(self, name: str):
        self.name, self.fixes = name, FIXES.get(name, {})
        self.reference = zoo.tiny_model(name, "eager")
        try:
            self.model = zoo.tiny_model(name, "sdpa")
        except ValueError:  # some have eager attention only
            self.model = zoo.tiny_model(name, "eager")

    def inputs(self, prompts: list[list[Piece]]) -> dict[str, Any]:
        return inputs(self.model, self.name, *prompts)

    def prompt(self, before: int, after: int, images: int = 1) -> list[Piece]:
        """Text, images, text; a bit more of it where the definition could take its length for another size."""
        forbidden = sizes(self.reference)
        while True:
            pieces: list[Piece] = [before, *["image", 1] * (images - 1), "image", after]
            seen = visual(self.inputs([pieces]))
            lengths = {seen.shape[1] + STEPS - 1, int((~seen).sum()) + STEPS - 1}
            if not lengths & forbidden:
                return pieces
            after += 1

    def alone(self, row: int, prompts: list[list[Piece]], whole: dict[str, Any]) -> dict[str, Any]:
        """The inputs of one sample of a batch, unpadded."""
        images = [prompt.count("image") for prompt in prompts]
        length = int(whole["attention_mask"][row].sum())
        own = {}
        for key, value in whole.items():
            if value.shape == whole["input_ids"].shape:
                own[key] = value[row : row + 1, -length:]
            elif "per sample" in self.fixes:
                own[key] = value[row : row + 1, : images[row]]
            elif images[row]:
                dim = self.fixes.get("along", {}).get(key, 0)
                each, start = value.shape[dim] // sum(images), sum(images[:row])
                own[key] = value.narrow(dim, each * start, each * images[row])
                if key in self.fixes.get("counts on", {}):
                    own[key] = own[key] - self.fixes["counts on"][key] * start
        return own

    def expected(
        self, prompts: list[list[Piece]], given: dict[str, Any], answers: torch.Tensor, exits: list[int]
    ) -> list[torch.Tensor]:
        """Logits of every sample's text tokens and of its answer, by the definition."""
        if self.fixes.get("definition") == "masks":
            whole = extend(self.name, given, answers)
            logits = masked(self.reference, whole, visual(whole), torch.tensor(exits))
            text = whole["attention_mask"].bool() & ~visual(whole)
            return [row[kept] for row, kept in zip(logits, text)]
        found = []
        for row, layer in enumerate(exits):
            whole = extend(self.name, self.alone(row, prompts, given), answers[row : row + 1])
            found.append(text_rows_alone(self.reference, whole, visual(whole)[0], layer))
        return found

    @torch.no_grad()
    def compare(self, prompts: list[list[Piece]], exits: list[int], needs: dict[str, Any]) -> list[torch.Tensor]:
        """Prompt logits and greedy decoding of a batch against the definition, which is returned.

        Raises:
            Mismatch: they differ by more than 1e-5 + 1e-4 of the value.
        """
        given = self.inputs(prompts)
        if "visual_mask" in needs:
            needs = needs | {"visual_mask": visual(given)}
        with dyvte.visual_exit(self.model, dyvte.FixedExit(exits), **needs) as handle:
            logits = self.model(**given).logits
            layers = [handle.layers.tolist()]
            out = self.model.generate(
                **given, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            layers.append(handle.layers.tolist())
        if layers != [exits, exits]:
            raise Mismatch(f"exits {exits} became {layers}")
        answers = out.sequences[:, -STEPS:]
        text = given["attention_mask"].bool() & ~visual(given)
        definition = self.expected(prompts, given, answers[:, :-1], exits)
        for row, expected in enumerate(definition):
            place = f"exit {exits[row]} of {exits}"
            check(f"prompt, {place}", logits[row, text[row]], expected[: 1 - STEPS])
            check(f"decoding, {place}", torch.stack([step[row] for step in out.logits]), expected[-STEPS:])
            likely = expected[-STEPS:].clone()
            likely[:, [zoo.PAD, *range(zoo.IMAGE, expected.shape[1])]] = -float("inf")
            if answers[row].tolist() != likely.argmax(-1).tolist():
                raise Mismatch(f"greedy ids, {place}")
        return definition

    @torch.no_grad()
    def compare_trace(
        self, prompts: list[list[Piece]], exits: tuple[int, int], last: int, needs: dict[str, Any]
    ) -> None:
        """What a trace says of every exit's next token, against the definition."""
        given = self.inputs(prompts)
        needs = needs | {"visual_mask": visual(given)} if needs else needs
        trace = dyvte.trace_batch(self.model, given, **needs)
        answers = torch.full((len(prompts), STEPS - 1), 5)
        dense = self.expected(prompts, given, answers, [last] * len(prompts))
        for layer in exits:
            leaving = self.expected(prompts, given, answers, [layer] * len(prompts))
            for row, (at_exit, whole) in enumerate(zip(leaving, dense)):
                q, p = at_exit[-STEPS].log_softmax(-1), whole[-STEPS].log_softmax(-1)
                check(f"trace of exit {layer}, NLL", trace.nll[row, layer - 1], -q[p.argmax()])
                check(f"trace of exit {layer}, KL", trace.kl[row, layer - 1], (q.exp() * (q - p)).sum())


def check(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    if got.shape != expected.shape:
        raise Mismatch(f"{what}: {list(got.shape)} logits, not {list(expected.shape)}")
    if not torch.allclose(got, expected, atol=1e-5, rtol=1e-4):
        raise Mismatch(f"{what}: off by {float((got - expected).abs().max()):.1e}")


def examine(name: str) -> Account:
    """Runs a type through everything, up to the first thing that does not hold."""
    fixes = FIXES.get(name, {})
    if "without a prompt" in fixes or "no decoder" in fixes:
        outcome = "no decoder-only prompt" if "without a prompt" in fixes else "refused"
        try:
            dyvte.attach(zoo.tiny_model(name), dyvte.NeverExit()).detach()
        except Exception as error:
            if refusal(error):
                return Account(outcome, fixes.get("without a prompt") or fixes["no decoder"])
            return Account("wrong", f"{type(error).__name__}: {error}")
        return Account("wrong", "attaching is not refused")
    subject, first, needs = Subject(name), None, {}
    try:
        first, largest, last, needs = allowed_exits(subject)
        single = subject.prompt(3, 5)
        logits = [subject.compare([single], [layer], needs)[0] for layer in (first, largest, last)]
        if (logits[0] - logits[-1])[: 1 - STEPS].abs().max() < 1e-3:
            raise Mismatch(f"exit {first} changes nothing, so nothing was tested")
        prompts = [single, subject.prompt(1, 9), subject.prompt(2, 2, images=2)]
        if "same length" in fixes:
            prompts = [single, [1, *single[1:-1], single[-1] + 2], [4, *single[1:-1], single[-1] - 1]]
        for exits in ([first, last, largest], [min(first + 2, largest), first, min(first + 1, largest)]):
            subject.compare(prompts, exits, needs)
        subject.compare_trace(prompts, (first, largest), last, needs)
    except Mismatch as error:
        return Account("wrong", str(error), first, ", ".join(needs))
    except Exception as error:
        if refusal(error):
            return Account("refused", str(error))
        return Account("wrong", f"{type(error).__name__}: {error}", first, ", ".join(needs))
    return Account("exact", fixes.get("same length", ""), first, ", ".join(needs))


def refusal(error: Exception) -> bool:
    """Whether it is dyvte that says so, and as a ValueError."""
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError) and Path(dyvte.__file__).parent in Path(place).parents


def allowed_exits(subject: Subject) -> tuple[int, int, int, dict[str, Any]]:
    """The smallest and the largest exit of the handle, the number of layers, and what attaching needs beside them."""
    for needs in ({}, {"visual_mask": torch.ones(1, 1, dtype=torch.bool)}):
        try:
            with dyvte.visual_exit(subject.model, dyvte.NeverExit(), **needs) as handle:
                return handle.min_layer, handle.spec.largest, handle.num_layers, needs
        except ValueError as error:
            if needs or "pass visual_mask" not in str(error):
                raise
    raise AssertionError


def table(types: dict[str, dict[str, Any]]) -> str:
    """The account as a table, exact types first."""
    order = ("exact", "refused", "no decoder-only prompt", "wrong")
    rows = ["| type | outcome | smallest exit | note |", "|---|---|---|---|"]
    for name, account in sorted(types.items(), key=lambda item: (order.index(item[1]["outcome"]), item[0])):
        note = account.get("why", "").split(": use ")[0].split(". Use ")[0]
        if account.get("needs"):
            note = "; ".join(part for part in (f"pass `{account['needs']}`", note) if part)
        rows.append(
            f"| {name} | {account['outcome']} | {account.get('smallest_exit', '')} | {note} |".replace("  ", " ")
        )
    return "\n".join(rows)


def page(types: dict[str, dict[str, Any]]) -> str:
    """The page with the table between its marks."""
    before, rest = PAGE.read_text().split(START)
    return f"{before}{START}\n{table(types)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    transformers.logging.set_verbosity_error()
    accounts = {name: examine(name) for name in sys.argv[1:] or zoo.MAPPING}
    for name, account in accounts.items():
        print(f"{name:24} {account.outcome:8} {account.why[:160]}")
    if not sys.argv[1:]:
        types = {name: account.entry() for name, account in accounts.items()}
        RECORD.write_text(json.dumps({"transformers": transformers.__version__, "types": types}, indent=1) + "\n")
        PAGE.write_text(page(types))


if __name__ == "__main__":
    main()
