"""Connecting to a Ray cluster: which one a run means, and one line within seconds when it does not answer.

Ray itself tries for minutes, prints tracebacks of several processes, and then may end the process.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel

_ANSWER_S = 5.0
_LAST_PORT = 65_535
# What Ray's own processes ask a head node, to hear whether it is alive.
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CURES = (
    "start it (ray start --head), correct run.address or RAY_ADDRESS, or train on this machine alone with "
    "run.address=local"
)


def cluster_address(address: str) -> str | None:
    """Return the address of the cluster that `run.address` means, None for a Ray of this machine's own.

    Args:
        address: auto (RAY_ADDRESS where it is set, else this machine's own), local, or host:port.
    """
    named = os.environ.get("RAY_ADDRESS", "").strip() if address == "auto" else address
    return None if named in {"", "local"} else named


def connect(address: str, **options: Any) -> None:
    """Connect to a cluster of which this machine is a part.

    Args:
        address: host:port of its head, or auto for the one that runs on this machine.
        **options: as for ray.init.

    Raises:
        ValueError: it does not answer within seconds, or can't be joined from here; one line with the cure.
    """
    if "://" in address:
        raise ValueError(
            f"Ray address {address} is one for clients, and a run needs a machine of the cluster itself: submit it "
            "with ray job submit --address http://HEAD:8265 --working-dir . -- rayprune train CONFIG, or name HEAD:6379"
        )
    if address != "auto":
        _check_answer(address)
    try:
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        ray.shutdown()
        where = "on this machine" if address == "auto" else f"at {address}"
        if _is_about_a_token(error):
            raise _asks_for_a_token(where) from error
        raise ValueError(f"no Ray cluster can be joined {where} ({first_line(error)}): {_CURES}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _asks_for_a_token(where: str) -> ValueError:
    return ValueError(
        f"the Ray cluster {where} asks for a token that this process does not send: set RAY_AUTH_MODE=token and "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, here and on every machine of the cluster"
    )


def _is_about_a_token(error: BaseException | None) -> bool:
    while error is not None and "AuthenticationError" not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


def _check_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _LAST_PORT:
        raise ValueError(f"Ray address {address!r} is none of auto, local, HOST:PORT (such as 10.0.0.1:6379)")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
        # Something listens; Ray would wait for minutes to hear that it is no head node, or one that hangs.
        channel = init_grpc_channel(address)
        with contextlib.closing(channel):
            channel.unary_unary(_ALIVE)(b"", timeout=_ANSWER_S)
    except grpc.RpcError as error:
        if error.code() in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}:
            raise _asks_for_a_token(f"at {address}") from None
        late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        why = f"nothing within {_ANSWER_S:g} s" if late else "what listens there is no head node of Ray"
        raise ValueError(f"no Ray cluster answers at {address} ({why}): {_CURES}") from None
    except UnicodeError:
        raise ValueError(f"Ray address {address!r} names no host: {_CURES}") from None
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster answers at {address} ({first_line(error)}): {_CURES}") from None
