"""`kdrl serve-teacher`."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

from kdrl_pl.cli.errors import Parser
from kdrl_pl.errors import RunError
from kdrl_pl.teacher.calls import TOKEN_VARIABLE, read_token


def main(command: str, arguments: list[str]) -> None:
    """Serve a frozen teacher over HTTP, for runs whose teacher is kdrl_pl.teacher.RemoteTeacher.

    Ctrl-C or SIGTERM stops it. See docs/served_teacher.md.

    Raises:
        ValueError: no such model, or an address that others can reach without a token.
    """
    options = _options(arguments)
    token = read_token(options.token_file)
    if options.host != "127.0.0.1" and token is None:
        raise ValueError(
            f"--host {options.host} lets other machines ask this teacher: give a token, as --token-file FILE or in "
            f"the environment variable {TOKEN_VARIABLE}, or stay at --host 127.0.0.1"
        )
    try:
        from kdrl_pl.teacher.server import end_with_parent, make_server
    except ImportError as error:
        raise ValueError(f"kdrl serve-teacher needs LitServe ({error}): pip install 'kdrl_pl[serve]'") from None
    from kdrl_pl.teacher.frozen import FrozenTeacher

    teacher = FrozenTeacher(
        options.model,
        options.dtype,
        options.quantization,
        max_tokens_per_micro_batch=options.max_tokens_per_micro_batch,
    )
    server = make_server(
        teacher,
        device=options.device,
        token=token,
        max_batch_size=options.max_batch_size,
        batch_timeout=options.batch_timeout,
        max_tokens_per_request=options.max_tokens_per_request,
    )
    os.register_at_fork(after_in_child=end_with_parent)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # LitServe ends in good order on Ctrl-C only
    print(
        f"teacher {teacher.fingerprint()} ({options.model}) at http://{options.host}:{options.port}; "
        "it answers once it is loaded (/health)",
        flush=True,
    )
    try:
        server.run(
            host=options.host,
            port=options.port,
            num_api_servers=1,
            log_level="warning",
            generate_client_file=False,
            access_log=False,
            server_header=False,
        )
    except RuntimeError as error:
        raise RunError(f"the teacher did not start: {error}; the reason stands above") from error


def _options(arguments: list[str]) -> argparse.Namespace:
    description = "\n".join(line.strip() for line in main.__doc__.partition("Raises:")[0].splitlines())
    parser = Parser(prog="kdrl serve-teacher", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="Hugging Face folder or hub name of the teacher")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: %(default)s)")
    add("--quantization", choices=("8bit", "4bit"), help="through bitsandbytes (default: the weights as they are)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add(
        "--host",
        choices=("127.0.0.1", "0.0.0.0", "::"),
        default="127.0.0.1",
        help="0.0.0.0 and :: let other machines ask, and need a token (default: %(default)s)",
    )
    add("--port", type=int, default=8000, help="1024 to 65535 (default: %(default)s)")
    add(
        "--max-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="requests that may share a forward pass; above 1, log-probs are the same only up to rounding (default: 1)",
    )
    add("--batch-timeout", type=float, default=0.01, metavar="SECONDS", help="to wait for them (default: %(default)s)")
    add(
        "--max-tokens-per-request",
        type=int,
        default=65536,
        metavar="N",
        help="larger ones get 413 (default: %(default)s)",
    )
    add(
        "--max-tokens-per-micro-batch",
        type=int,
        default=16384,
        metavar="N",
        help="tokens, padding counted, of one forward pass (default: %(default)s)",
    )
    add("--token-file", type=Path, metavar="FILE", help=f"holds the bearer token (default: ${TOKEN_VARIABLE})")
    options = parser.parse_args(arguments)
    if options.max_batch_size < 1 or options.max_tokens_per_request < 1 or options.batch_timeout < 0:
        parser.error("--max-batch-size and --max-tokens-per-request are at least 1, --batch-timeout at least 0")
    if not 1024 <= options.port <= 65535:
        parser.error(f"--port is {options.port}; expected 1024 to 65535")
    return options
