"""Multiple-choice questions: the choice of highest summed log-likelihood after its context is the answer given."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minitron.config.model import ModelConfig
from minitron.data.batch import NO_SAMPLE, Batch
from minitron.errors import DataError
from minitron.losses import linear_cross_entropy
from minitron.models.gpt import FinalState
from minitron.parallel.groups import Groups
from minitron.prune.removal import everywhere


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        contexts: Text before each choice.
        choices: The choices.
        answer: Place of the right one.
    """

    contexts: list[str]
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class QuestionSheet:
    """Questions as token rows, one for each choice.

    Attributes:
        batches: This data-parallel rank's rows: the loss mask marks the labels that belong to the choice, and the
            sample index is the row's number.
        first_rows: Row of each question's first choice, and the number of rows.
        answers: Place of each question's right choice.
    """

    batches: list[Batch]
    first_rows: list[int]
    answers: list[int]


def read_questions(path: Path) -> list[Question]:
    """Read a JSONL file of ``{context, choices, answer}``.

    Raises:
        DataError: A line is none; the message has its number.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"score.depth.questions={path} cannot be read: {error.strerror}") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values: dict[str, Any] = json.loads(line)
            choices, context, answer = list(values["choices"]), values["context"], int(values["answer"])
            contexts = list(context) if isinstance(context, list) else [context] * len(choices)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: {type(error).__name__} {error}; each line must be JSON like "
                '{"context": "The sky is", "choices": ["blue", "loud"], "answer": 0}'
            ) from error
        if len(choices) < 2 or len(contexts) != len(choices) or not 0 <= answer < len(choices):
            raise DataError(
                f"{path}, line {number}: {len(choices)} choices, {len(contexts)} contexts and answer {answer}; give at "
                "least two choices, one context or as many, and the place of the right one, from 0"
            )
        questions.append(Question(contexts, choices, answer))
    if not questions:
        raise DataError(f"score.depth.questions={path} holds no questions")
    return questions


def question_sheet(
    questions: Sequence[Question],
    encode: Callable[[str], list[int]],
    *,
    micro_batch_size: int,
    max_length: int,
    dp_rank: int,
    dp_size: int,
) -> QuestionSheet:
    """Tokenise questions and deal their rows to the data-parallel ranks.

    A space is put between context and choice where neither brings one. Context and choice are encoded together, as
    they would stand in a text.

    Args:
        questions: The questions.
        encode: From text to token ids, without special tokens.
        micro_batch_size: Rows of a micro-batch.
        max_length: Positions of the model.
        dp_rank: This data-parallel rank.
        dp_size: Number of them.

    Raises:
        DataError: A context or a choice has no tokens, or the two have too many.
    """
    rows: list[tuple[list[int], int]] = []
    first_rows = [0]
    for number, question in enumerate(questions, start=1):
        for context, choice in zip(question.contexts, question.choices, strict=True):
            joint = " " if context and not context[-1].isspace() and choice and not choice[0].isspace() else ""
            ids, given = encode(context + joint + choice), len(encode(context.rstrip()))
            if not 0 < given < len(ids) <= max_length:
                raise DataError(
                    f"score.depth.questions: question {number} has a context of {given} tokens and {len(ids)} with "
                    f"the choice {choice!r}; both must have some, and together at most {max_length}"
                )
            rows.append((ids, given))
        first_rows.append(len(rows))
    mine = [list(enumerate(rows))[first : first + micro_batch_size] for first in range(0, len(rows), micro_batch_size)]
    batches = [_batch(part) for part in mine[dp_rank::dp_size]]
    return QuestionSheet(batches, first_rows, [question.answer for question in questions])


def _batch(rows: Sequence[tuple[int, tuple[list[int], int]]]) -> Batch:
    """Rows padded to the longest behind their ends, where causal attention never looks."""
    length = max(len(ids) for _, (ids, _) in rows) - 1
    tokens_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    labels_BS, mask_BS = torch.zeros_like(tokens_BS), torch.zeros(len(rows), length)
    for place, (_, (ids, given)) in enumerate(rows):
        tokens_BS[place, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels_BS[place, : len(ids) - 1] = torch.tensor(ids[1:])
        mask_BS[place, given - 1 : len(ids) - 1] = 1
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        position_ids_BS=torch.arange(length).repeat(len(rows), 1),
        loss_mask_BS=mask_BS,
        sample_index_B=torch.tensor([number for number, _ in rows]),
    )


class QuestionTally:
    """Log-likelihoods of all choices under all variants; a `Measure`."""

    whole = True

    def __init__(
        self, sheet: QuestionSheet, num_variants: int, model: ModelConfig, groups: Groups, device: torch.device
    ) -> None:
        """Prepare an empty table.

        Args:
            sheet: The questions.
            num_variants: How many variants run, the whole model included.
            model: Architecture of the model.
            groups: This rank's process groups.
            device: Where the model is.
        """
        self._sheet = sheet
        self._vocab_size = model.vocab_size
        self._groups = groups
        self._nll = torch.zeros(num_variants, sheet.first_rows[-1], dtype=torch.float64, device=device)

    def begins(self, batch: Batch) -> None:
        """Nothing to count."""

    def meets(self, variant: int, state_SBH: Tensor, parent_SBH: Tensor, batch: Batch) -> None:
        """Nothing to see inside the model."""

    def ends(self, variant: int, final: FinalState, whole_model: FinalState, batch: Batch) -> None:
        """Sum the log-likelihood of each row's choice."""
        for place, number in enumerate(batch.sample_index_B.tolist()):
            assert number != NO_SAMPLE, "questions have no rows that fill up"
            chosen_S = batch.loss_mask_BS[place].bool()
            self._nll[variant, number] = linear_cross_entropy(
                final.hidden_SBH[chosen_S, place],
                final.weight_vH,
                batch.labels_BS[place, chosen_S],
                vocab_size=self._vocab_size,
                tp_group=self._groups.tp,
            ).double()

    def error_rates(self) -> NDArray[np.float64]:
        """Share of questions that each variant answers wrong, equal on every rank; a collective."""
        nll = everywhere(self._nll, self._groups)
        wrong = np.zeros(len(nll))
        bounds = zip(self._sheet.first_rows, self._sheet.first_rows[1:], self._sheet.answers, strict=False)
        for first, stop, answer in bounds:
            wrong += nll[:, first:stop].argmin(axis=1) != answer
        return wrong / len(self._sheet.answers)
