"""GSM8K: grade-school mathematics in words (Cobbe et al. 2021), scored on the final number.

Prompts are the harness's. Four scores, since reports differ in how they find the number:

- `exact_match_flexible`: the last number of the output (the harness's "flexible-extract"),
- `exact_match_strict`: the number after `####`, the data's own form (its "strict-match"),
- `exact_match_proxy`: that of Liu et al. 2024 (proxy tuning), whom the paper compares with,
- `number_match`: the last number of the output, however it is written, by its value (as SVAMP).

Outputs are cut at "Question:", as the harness does. They may have 512 tokens, as in Liu et al.
"""

from __future__ import annotations

import re
import string

from dlf_ray.evaluation.tasks.common import Item, Response, Scores, Task, number_match
from dlf_ray.evaluation.tasks.data import Row, Source

INVALID = "[invalid]"


def build(row: Row) -> Item:
    """The solution's last line is `#### 18`."""
    question, solution = row.text("question"), row.text("answer")
    _, found, answer = solution.partition("####")
    if not found or not re.search(r"\d", answer):
        raise ValueError("the answer does not end in `#### ` and a number")
    return Item(
        id=row.name,
        prompt=f"Question: {question}\nAnswer:",
        target=f" {solution}",
        answers=(answer.strip(),),
    )


def flexible(text: str) -> str:
    """The harness's "flexible-extract" of gsm8k.yaml, version 3."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return (found[-1][0] or found[-1][1]).strip() if found else INVALID


def strict(text: str) -> str:
    """The harness's "strict-match" of gsm8k.yaml, version 3."""
    found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    return str(found[0]).strip() if found else INVALID


def plain(answer: str) -> str:
    """What the harness drops on both sides before it compares."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer = re.sub(pattern, "", answer)
    return answer.lower()


def proxy(text: str) -> str:
    """Liu et al. 2024, eval/gsm/run_eval.py: the last number up to where a model that does not end
    asks itself the next question; the whole output if there is none."""
    for prefix in ("Answer the following question", "Question:", "Comment:"):
        text = text.split(prefix)[0]
    text = _joined(text)
    numbers = re.findall(r"[-+]?\d*\.\d+|\d+", text)
    return numbers[-1] if numbers else text


def proxy_match(found: str, answer: str) -> bool:
    """As they compare: without case and punctuation, so that signs and decimal points do not
    count either."""
    drop = str.maketrans("", "", string.punctuation)
    return found.lower().translate(drop) == _joined(answer).lower().translate(drop)


def _joined(text: str) -> str:
    return re.sub(r"(\d),(\d)", r"\1\2", text)


def score(item: Item, response: Response) -> Scores:
    """All four."""
    (answer,), text = item.answers, response.text
    return {
        "exact_match_flexible": float(plain(flexible(text)) == plain(answer)),
        "exact_match_strict": float(plain(strict(text)) == plain(answer)),
        "exact_match_proxy": float(proxy_match(proxy(text), answer)),
        **number_match(item, response),
    }


def extract(_: Item, response: Response) -> str:
    """By the headline score."""
    return plain(flexible(response.text))


GSM8K = Task(
    name="gsm8k",
    version="2",
    kind="generate",
    metrics=("exact_match_flexible", "exact_match_strict", "exact_match_proxy", "number_match"),
    source=Source(
        folder="gsm8k",
        files={"test": ["test.jsonl"], "train": ["train.jsonl"]},
        hub="openai/gsm8k",
        config="main",
        splits={"test": "test", "train": "train"},
    ),
    build=build,
    score=score,
    extract=extract,
    max_tokens=512,
    stop=("Question:", "</s>", "<|im_end|>"),
)
