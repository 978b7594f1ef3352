"""`dlf serve`: a family behind OpenAI's API on this machine."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from dlf_ray.cli.common import FamilyFile, console, errors


def serve(
    family: FamilyFile,
    host: Annotated[str, typer.Option(help="0.0.0.0 is for everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where it listens.", min=1, max=65535)] = 8000,
    model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="What requests give as `model`; the file's name if not set. Given several times, "
            "each is a name of the family."
        ),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A Jinja file, where the tokenizer has no chat template.")
    ] = None,
    max_queued: Annotated[int, typer.Option(help="Sequences that may wait for a slot.", min=0)] = (
        256
    ),
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="Of pages elsewhere that may ask, each by itself; `*` for all."),
    ] = None,
    allow_expert_updates: Annotated[
        bool, typer.Option("--allow-expert-updates", help="Let `dlf expert` change the family.")
    ] = False,
) -> None:
    """Serve a family behind OpenAI's API, until ctrl-C. For a cluster: `serve deploy`.

    The environment variable DLF_API_KEYS holds the keys, by commas, that requests have to bring.
    """
    from dlf_ray.serving.app import Settings, run_server
    from dlf_ray.serving.replica import Model

    with errors():
        model = Model(family=str(family), chat_template=chat_template)
        settings = Settings(
            families=dict.fromkeys(model_name or [family.stem], model),
            max_queued=max_queued,
            cors_allow_origins=allowed_origins or [],
            allow_expert_updates=allow_expert_updates,
        )
        run_server(settings, host, port, say=partial(console.print, soft_wrap=True))
