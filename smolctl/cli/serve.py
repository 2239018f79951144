"""smolctl serve"""

from __future__ import annotations

from typing import Annotated

import typer

from smolctl.cli.options import Dtype, KvCache, ModelOrNewest, Threads, capped_threads, command
from smolctl.views.output import Output


@command
def serve(
    output: Output,
    model: ModelOrNewest = "runs/latest",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 accepts other machines.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="SMOLCTL_API_KEY",
            metavar="KEY",
            help="Key that every client must send.",
            show_default=False,
        ),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Accept other machines without a key.")
    ] = False,
    slots: Annotated[
        int, typer.Option("--slots", min=1, max=256, help="Number of answers to generate at once.")
    ] = 8,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=2,
            help="Maximum tokens of a prompt with its answer. Default: the model's context, at most 2,048.",
        ),
    ] = None,
    waiting: Annotated[
        int,
        typer.Option(
            "--waiting", min=0, help="Requests that may wait for a slot; further ones get status 503."
        ),
    ] = 64,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.1, help="Maximum seconds per answer, including the wait for a slot."),
    ] = 600.0,
    ping: Annotated[
        float,
        typer.Option(
            "--ping",
            min=0,
            help="Seconds without a token after which a stream gets a keep-alive comment; 0: never.",
        ),
    ] = 15.0,
    dtype: Dtype = None,
    kv_cache: KvCache = "auto",
    threads: Threads = None,
) -> None:
    """Serve a model over an OpenAI-compatible API.

    Requires the extra 'serve'.

    \b
    smolctl serve                          # the newest run, at 127.0.0.1:8000/v1
    smolctl serve FILE.gguf --port 8080 --slots 4
    smolctl serve FILE.gguf --host 0.0.0.0 --api-key SECRET
    """
    from smolctl.generation.engines import EngineOptions
    from smolctl.views.serving import show_ready

    try:
        from smolctl.serving.guards import Limits
        from smolctl.serving.serve import ServeOptions
        from smolctl.serving.serve import serve as run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn", "anyio"):
            raise
        from smolctl.extras import missing_package

        raise missing_package(package, "serve") from None
    options = ServeOptions(
        host=host,
        port=port,
        api_key=api_key,
        no_api_key=no_api_key,
        slots=slots,
        context=context,
        limits=Limits(waiting=waiting, answer_s=timeout, ping_s=ping),
        engine=EngineOptions(dtype=dtype, threads=capped_threads(output, threads), kv_cache=kv_cache),
    )
    run(model, options, lambda ready: show_ready(output, ready))
