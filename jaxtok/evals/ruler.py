"""RULER-style jsonl: rows {"input", "outputs", optional "length"}, in and out."""

import json
import math
import pathlib
from collections.abc import Iterable

from jaxtok.evals.tasks import Encode, Example

# tokens that RULER lets a model generate
_GENERATE = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def read_jsonl(path: str | pathlib.Path, *, encode: Encode | None = None, limit: int | None = None) -> list[Example]:
    """RULER-style rows {"input", "outputs", optional "length"}; the task is the file's stem.

    The question is the last line of `input` (what follows its last newline, the newline included): in RULER's files the question and the
    start of the answer stand there. length: the row's, else counted with `encode`, else -1. max_new: RULER's for a file named like one of
    its tasks, else the longest answer's tokens or characters times the number of answers.
    Raises ValueError that names the line for a row that is not of this form.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read {path}: {e}") from None
    out = []
    for i, line in enumerate(lines, 1):
        if limit is not None and len(out) >= limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, answers = row["input"], row["outputs"]
            good = isinstance(text, str) and isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise ValueError(f'{path}:{i} is not a row {{"input": text, "outputs": [answers]}}')
        cut = max(0, text.rstrip("\n").rfind("\n"))
        context, question = text[:cut], text[cut:]
        count = len if encode is None else lambda t: len(encode(t))
        length = row["length"] if isinstance(row.get("length"), int) else -1 if encode is None else count(context) + count(question)
        found = context.find(answers[0])
        new = next((n for name, n in _GENERATE.items() if path.stem.startswith(name)), None)
        out.append(
            Example(
                context=context,
                question=question,
                answers=tuple(answers),
                depth=found / len(context) if found >= 0 else math.nan,
                length=length,
                task=path.stem,
                max_new=len(answers) * (max(map(count, answers)) + 2) if new is None else new,
            )
        )
    if not out:
        raise ValueError(f"{path} has no rows")
    return out


def write_jsonl(path: str | pathlib.Path, cases: Iterable[Example]) -> None:
    """Write cases as RULER's rows, which `read_jsonl` reads back (`input` is context + question)."""
    rows = ({"index": i, "input": e.context + e.question, "outputs": list(e.answers), "length": e.length} for i, e in enumerate(cases))
    pathlib.Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
