"""An S3-compatible server (moto) in a thread of this process, that can go away and come back."""

import socket
import threading
from typing import Any

import moto.server
from moto.s3.responses import S3Response

_put, _one_at_a_time = S3Response.put_object, threading.Lock()


def _put_object(self: S3Response) -> Any:
    """moto looks whether a condition holds and then writes; a real server does both in one step."""
    with _one_at_a_time:
        return _put(self)


S3Response.put_object = _put_object


class Server:
    """What it holds outlives a stop, as a server's disk does."""

    def __init__(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self._port = s.getsockname()[1]
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._thread = moto.server.ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._thread.start()

    def stop(self) -> None:
        self._thread.stop()
