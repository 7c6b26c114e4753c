"""Scores a model on a split: loss, exact match, and what its queries find in a database."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax_lora.data.batches import Batches
from jax_lora.data.encoding import encode_prompt
from jax_lora.data.examples import make_examples
from jax_lora.data.rows import Row, RowFile, boolean_field
from jax_lora.data.tokenizer import Tokenizer
from jax_lora.finetune.generation import Generator
from jax_lora.finetune.sql_metrics import exact_match, execution_match, load_database
from jax_lora.finetune.step import make_validation
from jax_lora.finetune.total_loss import total_loss

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Score:
    """How a model does on some rows.

    Args:
      rows: How many rows.
      tokens: How many tokens of theirs are learned in training, and scored.
      loss: Mean cross-entropy of those tokens.
      exact: Share of answers that are the reference's text; None if the rows have no answers.
      execution: Share whose query finds what the reference finds; None if rows name no database.
    """

    rows: int
    tokens: int
    loss: float
    exact: float | None = None
    execution: float | None = None

    @property
    def perplexity(self) -> float:
        """Among how many tokens the model wavers, as it were: exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The rows of a split, ready to score models on.

    Args:
      file: The rows.
      tokenizer: The model's tokenizer.
      max_length: Longest row in tokens.
      max_tokens: Most tokens of an answer.
      rows: Rows scored together.
    """

    file: RowFile
    tokenizer: Tokenizer
    max_length: int = 2048
    max_tokens: int = 64
    rows: int = 50

    def score(
        self, model: Any, variables: Any, *, answered: Callable[[int], None] | None = None
    ) -> dict[str, Score]:
        """Score a model on all rows and, if a field sorts them into two groups, on each.

        Args:
          model: A decoder of `jax_lora.models`.
          variables: `{"params": params}`, an adapter merged into them.
          answered: Is told how many rows have been answered so far.

        Returns:
          Scores by group, `"all"` first.
        """
        measure = make_validation(model)
        answers = self._answers(model, variables, answered)
        scores = {}
        for name, rows in self._groups().items():
            examples = make_examples(
                dataclasses.replace(self.file, rows=rows),
                self.tokenizer,
                max_length=self.max_length,
            )
            batches = Batches.of(examples.rows, self.rows)
            total, tokens = total_loss(measure, None, variables, batches)
            score = Score(len(rows), round(tokens), total / max(tokens, 1.0))
            scores[name] = self._judged(rows, answers, score)
        return scores

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

    def _answers(
        self, model: Any, variables: Any, answered: Callable[[int], None] | None
    ) -> dict[int, str]:
        """Answer every row that has a reference, by line."""
        rows = [row for row in self.file.rows if row.kind == "completions"]
        one_line = all("\n" not in row.fields["completion"].rstrip("\n") for row in rows)
        generator = Generator(
            model,
            variables,
            self.tokenizer,
            max_tokens=self.max_tokens,
            rows=min(self.rows, max(1, len(rows))),
            stop=("\n",) if one_line else (),
        )
        answers: dict[int, str] = {}
        for start in range(0, len(rows), generator.rows):
            part = rows[start : start + generator.rows]
            prompts = [encode_prompt(row.fields, self.tokenizer) for row in part]
            answers |= {
                row.line: text for row, text in zip(part, generator.answer(prompts), strict=True)
            }
            if answered is not None:
                answered(len(answers))
        return answers

    def _judged(self, rows: Sequence[Row], answers: dict[int, str], score: Score) -> Score:
        judged = [(row, answers[row.line]) for row in rows if row.line in answers]
        if not judged:
            return score
        exact = [exact_match(answer, row.fields["completion"]) for row, answer in judged]
        execution = None
        if all("database" in row.fields for row, _ in judged):
            execution = _share([self._executes(row, answer) for row, answer in judged])
        return dataclasses.replace(score, exact=_share(exact), execution=execution)

    def _executes(self, row: Row, answer: str) -> bool:
        script = load_database(_folder_of(self.file.path), row.fields["database"])
        return execution_match(answer, row.fields["completion"], script)


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
