"""The answers that a model may choose from, where these are fewer than its vocabulary."""

from __future__ import annotations

from pathlib import Path

from cluster.probes.reading import ANSWERS, column_of
from cluster.probes.tokens import one_token
from cluster.trained_model import TrainedModel
from trainer.corpus.line_reader import read_lines
from trainer.finetune.errors import TaskDataError
from trainer.finetune.tables import KINDS, read_table

_COLUMNS = ("answer", *ANSWERS)
_SHOWN = 3


def read_answers(path: Path | str) -> list[str]:
    """Answers, each once, in the file's order: a text file has one a line, a table a column.

    Raises:
        TaskDataError: no such file, no column answer or obj, or no answer.
        CorpusError: the file cannot be read or is not UTF-8.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in KINDS:
        table = read_table(path, "--answers")
        given = ["" if v is None else str(v) for v in table.columns[column_of(table, _COLUMNS)]]
    elif path.is_file():
        given = [line for _, line in read_lines(path)]
    else:
        raise TaskDataError(f"--answers = {str(path)!r}: there is no such file; correct the path")
    answers = list(dict.fromkeys(answer.strip() for answer in given if answer.strip()))
    if not answers:
        raise TaskDataError(f"{path} has no answer; --answers needs one a line")
    return answers


def answer_tokens(
    trained: TrainedModel, answers: list[str], *, skip_unfit: bool
) -> tuple[frozenset[int], int]:
    """The answers' tokens, and how many of the answers are left out.

    Raises:
        TaskDataError: some are not one token and `skip_unfit` is off, or none is left.
    """
    tokens, unfit = set(), []
    for answer in answers:
        token = one_token(trained, answer)
        if token is None:
            unfit.append(answer)
        else:
            tokens.add(token)
    if unfit and not skip_unfit:
        raise TaskDataError(
            f"{len(unfit)} of {len(answers)} --answers are not one token of this model, such as "
            f"{', '.join(map(repr, unfit[:_SHOWN]))}; leave such ones out with --skip-unfit"
        )
    if not tokens:
        raise TaskDataError("none of the --answers is one token of this model")
    return frozenset(tokens), len(unfit)
