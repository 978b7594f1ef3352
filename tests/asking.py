"""How tests ask an endpoint, and what they make of its answers."""

import requests

PROMPT = "The moon is made of"
TIMEOUT_S = 60


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
