"""Evaluate a model on a split: loss, and the metrics of the task."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jax_lora.data.encoding import encode_prompt
from jax_lora.data.rows import Row, RowFile, boolean_field
from jax_lora.finetune.classification_metrics import accuracy, macro_f1
from jax_lora.finetune.devices import split_rows
from jax_lora.finetune.generation import Generator
from jax_lora.finetune.prediction import complete, masked_accuracy, predict_classes
from jax_lora.finetune.settings import TrainSettings
from jax_lora.finetune.sql_metrics import exact_match, execution_match, load_database
from jax_lora.finetune.tasks import (
    CAUSAL,
    CLASSES,
    MASKED,
    SEQ2SEQ,
    encode_examples,
    longest_input,
    loss_for,
    make_batches,
)
from jax_lora.finetune.validation import make_validation, total_loss

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Score:
    """Metrics of a model on some examples; None where a metric does not apply.

    Args:
      rows: Number of examples.
      tokens: Number of targets: tokens, or classes.
      loss: Mean cross-entropy of the targets.
      exact: Fraction of completions with the same text as the reference.
      execution: Fraction of queries with the same result as the reference.
      accuracy: Fraction of correct classes, or of correct masked tokens.
      f1: Macro-averaged F1 of the classes.
    """

    rows: int
    tokens: int
    loss: float
    exact: float | None = None
    execution: float | None = None
    accuracy: float | None = None
    f1: float | None = None

    @property
    def perplexity(self) -> float:
        """Perplexity: exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def _counter(total: int, advance: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """Return a function that adds done examples, and tells how many are done."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        if advance is not None:
            advance(done, total)

    return add


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The examples of a split, ready to evaluate models on.

    Args:
      file: The examples.
      tokenizer: From `jax_lora.finetune.tasks.tokenizer_for`.
      task: One of `jax_lora.finetune.tasks.TASKS`.
      max_length: Maximum sequence length in tokens.
      max_tokens: Maximum number of tokens of a completion.
      rows: Examples per batch.
      mesh: Devices that share the examples of a batch and the model; None: one.
    """

    file: RowFile
    tokenizer: Any
    task: str = CAUSAL
    max_length: int = 2048
    max_tokens: int = 64
    rows: int = 50
    mesh: Mesh | None = None

    def score(
        self, model: Any, variables: Any, *, advance: Callable[[int, int], None] | None = None
    ) -> dict[str, Score]:
        """Evaluate a model on all examples, and on the two groups of a boolean field.

        Args:
          model: A model of `jax_lora.models`.
          variables: `{"params": params}`, with an adapter merged.
          advance: Called with the examples done so far and all of them. An example counts once
            for its completion, and once for each group in which its loss is measured.

        Returns:
          Scores by group, `"all"` first.
        """
        mesh = self.mesh
        devices = 1 if mesh is None else mesh.size
        groups, prompted = self._groups(), self._prompted()
        work = _counter(len(prompted) + sum(map(len, groups.values())), advance)
        measure = make_validation(loss_for(self.task, model.clone(mesh=mesh), devices=devices))
        split = (lambda batch: batch) if mesh is None else functools.partial(split_rows, mesh=mesh)
        place = lambda batch: work(self.rows) or split(batch)  # noqa: E731
        answers = self._answers(model, variables, prompted, work)
        scores = {}
        for name, rows in groups.items():
            batches = self._batches(model, rows)
            loss, tokens = _mean_loss(measure, variables, batches, place=place)
            score = Score(len(rows), round(tokens), loss)
            if self.task == CLASSES:
                score = _classified(model, variables, batches, score)
            elif self.task == MASKED:
                share = masked_accuracy(model, variables, batches)
                score = dataclasses.replace(score, accuracy=share)
            scores[name] = self._with_matches(rows, answers, score)
        return scores

    def loss(self, model: Any, variables: Any) -> float:
        """Compute the mean loss of the targets of all examples."""
        measure = make_validation(loss_for(self.task, model))
        return _mean_loss(measure, variables, self._batches(model, self.file.rows))[0]

    def _batches(self, model: Any, rows: Sequence[Row]) -> Any:
        file = dataclasses.replace(self.file, rows=tuple(rows))
        settings = TrainSettings(max_seq_length=self.max_length)
        examples = encode_examples(self.task, file, model, self.tokenizer, settings)
        return make_batches(self.task, examples, model, self.tokenizer, self.rows)

    def _groups(self) -> dict[str, tuple[Row, ...]]:
        groups = {ALL: self.file.rows}
        field = boolean_field(self.file.rows)
        if field is None:
            return groups
        for value in (True, False):
            chosen = tuple(row for row in self.file.rows if row.fields[field] is value)
            if chosen and len(chosen) < len(self.file.rows):
                groups[f"{field}: {str(value).lower()}"] = chosen
        return groups

    def _prompted(self) -> list[Row]:
        """Return the examples with a prompt that is completed and a reference."""
        generates = self.task in (CAUSAL, SEQ2SEQ)
        return [row for row in self.file.rows if generates and row.kind == "completions"]

    def _answers(
        self, model: Any, variables: Any, rows: Sequence[Row], work: Callable[[int], None]
    ) -> dict[int, str]:
        """Complete prompts, by line."""
        if not rows:
            return {}
        if self.task == SEQ2SEQ:
            return self._completions(model, variables, rows)
        one_line = all("\n" not in row.fields["completion"].rstrip("\n") for row in rows)
        generator = Generator(
            model,
            variables,
            self.tokenizer,
            max_tokens=self.max_tokens,
            rows=min(self.rows, len(rows)),
            stop=("\n",) if one_line else (),
        )
        answers: dict[int, str] = {}
        for start in range(0, len(rows), generator.rows):
            part = rows[start : start + generator.rows]
            prompts = [encode_prompt(row.fields, self.tokenizer) for row in part]
            answers |= {
                row.line: text for row, text in zip(part, generator.answer(prompts), strict=True)
            }
            work(len(part))
        return answers

    def _completions(self, model: Any, variables: Any, rows: Sequence[Row]) -> dict[int, str]:
        most = min(self.max_length, longest_input(model))
        prompts = [self.tokenizer.encode(row.fields["prompt"], max_length=most).ids for row in rows]
        texts = complete(
            model, variables, self.tokenizer, prompts, max_tokens=self.max_tokens, rows=self.rows
        )
        return {row.line: text for row, text in zip(rows, texts, strict=True)}

    def _with_matches(self, rows: Sequence[Row], answers: dict[int, str], score: Score) -> Score:
        completed = [(row, answers[row.line]) for row in rows if row.line in answers]
        if not completed:
            return score
        exact = [exact_match(answer, row.fields["completion"]) for row, answer in completed]
        execution = None
        if all("database" in row.fields for row, _ in completed):
            execution = _share([self._executes(row, answer) for row, answer in completed])
        return dataclasses.replace(score, exact=_share(exact), execution=execution)

    def _executes(self, row: Row, answer: str) -> bool:
        path = self.file.path
        script = load_database(path if path.is_dir() else path.parent, row.fields["database"])
        return execution_match(answer, row.fields["completion"], script)


def _mean_loss(measure: Any, variables: Any, batches: Any, **place: Any) -> tuple[float, float]:
    """Return the mean loss of the targets, and their number."""
    total, tokens = total_loss(measure, None, variables, batches.once(), **place)
    return total / max(tokens, 1.0), tokens


def _classified(model: Any, variables: Any, batches: Any, score: Score) -> Score:
    labels = {example.line: example.label for example in batches.examples}
    found = predict_classes(model, variables, batches)
    predicted = np.array([each.number for each in found])
    right = np.array([labels[each.line] for each in found])
    both = {"accuracy": accuracy(predicted, right), "f1": macro_f1(predicted, right)}
    return dataclasses.replace(score, **both)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
