"""How tests ask an endpoint, and what they make of its answers."""

import json

import requests

PROMPT = "The moon is made of"
TIMEOUT_S = 60
SOON_S = 10  # what is refused is refused within a second; machines that run tests are busy


def post(url, path="/v1/completions", **body):
    return requests.post(url + path, json={"model": "dlf", **body}, timeout=TIMEOUT_S)


def completed(url, **body):
    answer = post(url, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def refused(answer, status, *words):
    """An error of OpenAI's shape that says what it is about."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    return error


def events(answer):
    """The data of a stream, without its end mark."""
    lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]
