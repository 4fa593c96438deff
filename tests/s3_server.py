"""An S3-compatible server (moto) in a thread of this process, that can go away and come back."""

import socket

import moto.server


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
