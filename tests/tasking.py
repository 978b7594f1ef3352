"""What the tests of the benchmarks share: made-up items in the published formats, and answers."""

import json

from processes import TESTS

from dlf_ray.evaluation.tasks import Choice, Response

FIXTURES = TESTS / "fixtures" / "tasks"


def said(text, finish_reason="stop"):
    return Response(text=text, finish_reason=finish_reason)


def judged(*logprobs):
    return Response(choices=tuple(Choice(logprob) for logprob in logprobs))


def rows_as_files(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
