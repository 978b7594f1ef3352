"""`dlf expert`: experts that join or leave a family while it is served."""

from __future__ import annotations

import json
import os
import time
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

import typer
import yaml

from dlf_ray.cli.common import console, errors

expert = typer.Typer(help="Experts of a family that is being served.", no_args_is_help=True)
Url = Annotated[str, typer.Option(help="Where the family is served.")]
ModelName = Annotated[str | None, typer.Option(help="Its name, where several are served.")]


@expert.command("add")
def expert_add(
    name: Annotated[str, typer.Argument(help="The new expert's.")],
    setting: Annotated[
        list[str], typer.Argument(help="As in a family file: model=./math num_gpus=0.3 ...")
    ],
    url: Url = "http://127.0.0.1:8000",
    model_name: ModelName = None,
) -> None:
    """Load one more expert; requests go on. Returns once it takes part in them."""
    with errors():
        pairs = [each.partition("=") for each in setting]
        if wrong := [key for key, sign, _ in pairs if not sign]:
            raise ValueError(f"{wrong[0]!r} sets nothing; write it as {wrong[0]}=VALUE")
        spec = {key: yaml.safe_load(value) for key, _, value in pairs}
        if "model" in spec and Path(spec["model"]).is_dir():
            spec["model"] = str(Path(spec["model"]).resolve())
        _ask(url, "POST", "/v1/experts", {"model": model_name, "name": name, "expert": spec})
        _await_expert(url, model_name, name, "ready")


@expert.command("remove")
def expert_remove(
    name: Annotated[str, typer.Argument(help="Which one.")],
    url: Url = "http://127.0.0.1:8000",
    model_name: ModelName = None,
) -> None:
    """Take an expert out, once the requests that use it have ended."""
    with errors():
        query = f"?{urlencode({'model': model_name})}" if model_name else ""
        _ask(url, "DELETE", f"/v1/experts/{quote(name)}{query}")
        _await_expert(url, model_name, name, None)


@expert.command("list")
def expert_list(url: Url = "http://127.0.0.1:8000", model_name: ModelName = None) -> None:
    """The experts and their states."""
    with errors():
        for name, state in _expert_states(url, model_name).items():
            console.print(f"{name}: {state}", markup=False, highlight=False)


def _expert_states(url: str, model_name: str | None) -> dict[str, str]:
    query = f"?{urlencode({'model': model_name})}" if model_name else ""
    listed = _ask(url, "GET", f"/v1/experts{query}")
    return {each["id"]: each["state"] for each in listed["data"]}


def _await_expert(url: str, model_name: str | None, name: str, wanted: str | None) -> None:
    """Until the expert is in the wanted state. Raises `ValueError` if it could not join."""
    with console.status(f"waiting for {name}"):
        while (state := _expert_states(url, model_name).get(name)) != wanted:
            if state and state.startswith("failed: "):
                raise ValueError(state.removeprefix("failed: "))
            time.sleep(0.5)
    console.print(f"{name}: {wanted or 'gone'}", markup=False, highlight=False)


def _ask(url: str, method: str, path: str, body: object = None) -> Any:
    """A served family's answer. Raises `ValueError` with what it says where it refuses."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("DLF_API_KEYS", "").split(",")[0].strip():
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode() if body is not None else None
    request = Request(url.rstrip("/") + path, data, headers, method=method)
    try:
        with urlopen(request, timeout=60) as answer:
            status, text = answer.status, answer.read().decode(errors="replace")
    except HTTPError as error:
        status, text = error.code, error.read().decode(errors="replace")
    except URLError as error:
        raise ValueError(f"nothing is served at {url} ({error.reason})") from None
    except (OSError, HTTPException) as error:
        raise ValueError(f"what is at {url} broke off ({error!r})") from None
    try:
        said = json.loads(text)
        refusal = None if status < 400 else str(said["error"]["message"])
    except (ValueError, KeyError, TypeError):  # not from us: a proxy on the way, say
        start = " ".join(text.split())[:200]
        raise ValueError(f"{url} answered with status {status}: {start}") from None
    if refusal is not None:
        raise ValueError(refusal)
    return said
