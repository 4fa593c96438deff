"""A browser without a window, moved by its DevTools protocol: pages from disk, the network off."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 120  # seconds: the machine may be busy


def browser():
    """The browser on PATH, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab. `errors` are what scripts threw or logged as errors; `asked` every address loaded."""

    def __init__(self, loop, socket):
        self.loop, self.socket, self.count = loop, socket, 0
        self.errors, self.asked = [], []

    def call(self, method, **params):
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, params), PATIENCE))

    async def _call(self, method, params):
        self.count += 1
        mine = self.count
        await self.socket.send_json({"id": mine, "method": method, "params": params})
        while True:
            told = await self.socket.receive_json()
            if told.get("id") == mine:
                assert "error" not in told, told["error"]
                return told["result"]
            self._note(told)

    def _note(self, told):
        what = told.get("params", {})
        if told["method"] == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(what["exceptionDetails"])[:600])
        elif told["method"] == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(what["entry"]["text"])
        elif told["method"] == "Runtime.consoleAPICalled" and what["type"] == "error":
            self.errors.append(json.dumps(what["args"])[:600])
        elif told["method"] == "Network.requestWillBeSent":
            self.asked.append(what["request"]["url"])

    def run(self, code):
        """The value of an expression in the page, a promise's when it is kept."""
        told = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, code):
        """Wait until an expression is true, whatever page is there meanwhile."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({code})"):
            assert time.monotonic() < end, f"not true after {PATIENCE} s: {code}; {self.errors}"
            time.sleep(0.02)

    def open(self, address, width=1400, height=1000, dark=False):
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        offline = {"latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        self.call("Network.emulateNetworkConditions", offline=True, **offline)
        self.call("Emulation.setEmulatedMedia", media="", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call(
            "Page.navigate", url="about:blank"
        )  # an address that differs in its hash loads nothing
        self.wait("location.href === 'about:blank'")
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def picture(self, path, whole=True):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        told = self.call(
            "Page.captureScreenshot",
            captureBeyondViewport=whole,
            **({"clip": clip} if whole else {}),
        )
        Path(path).write_bytes(base64.b64decode(told["data"]))


@contextmanager
def a_page():
    """A new browser with one empty tab."""
    with tempfile.TemporaryDirectory() as profile:
        words = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        words += ["--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars"]
        words += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        environment = os.environ | {"DBUS_SESSION_BUS_ADDRESS": "disabled:"}
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        loop = asyncio.new_event_loop()
        try:
            with loop_of(loop, Path(profile)) as socket:
                yield Page(loop, socket)
        finally:
            process.terminate()
            process.wait(PATIENCE)
            loop.close()


@contextmanager
def loop_of(loop, profile):
    """The socket of the tab of the browser that keeps this profile."""

    async def connect():
        port = profile / "DevToolsActivePort"
        for _ in range(50 * PATIENCE):
            if port.exists() and (lines := port.read_text().splitlines()):
                break
            await asyncio.sleep(0.02)
        session = aiohttp.ClientSession()
        async with session.get(f"http://127.0.0.1:{lines[0]}/json/list") as told:
            (tab,) = [t for t in await told.json() if t["type"] == "page"]
        return session, await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    session, socket = loop.run_until_complete(asyncio.wait_for(connect(), PATIENCE))
    try:
        yield socket
    finally:
        loop.run_until_complete(socket.close())
        loop.run_until_complete(session.close())
