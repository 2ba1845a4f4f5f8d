"""Headless Chromium for tests of pages, driven over a pipe in its own protocol, so that no package is needed."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The smallest contrast of a text with what lies behind it (WCAG 2.2, 1.4.3), and the text.
CONTRAST = """(() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => parts(color).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [...document.querySelectorAll("body *")].filter((e) => [...e.childNodes].some(
      (n) => n.nodeType === 3 && n.data.trim()) && e.checkVisibility() && e.tagName !== "SCRIPT").map((e) => {
    let behind = e;
    while (behind && (parts(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
    const style = getComputedStyle(e);
    const [a, b] = [light(e.ownerSVGElement ? style.fill : style.color),
                    light(behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)")];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 40)];
  });
  return found.reduce((least, each) => each[0] < least[0] ? each : least);
})()"""


def in_browser(test):
    """Mark a test that needs one."""
    return pytest.mark.browser(pytest.mark.skipif(not CHROMIUM, reason="no chromium")(test))


class Browser:
    """One tab. `requests` are the addresses that pages have asked for, those of the pages themselves included."""

    def __init__(self, send, receive):
        self._send, self._receive, self._number, self._session = send, receive, 0, None
        self.requests = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Network.enable")
        self.call("Page.enable")

    def call(self, method, **params):
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": params, **session}
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        while (message := self._next()).get("id") != self._number:
            pass
        assert "error" not in message, message
        return message["result"]

    def _next(self):
        text = bytearray()
        while (byte := self._receive.read(1)) != b"\0":
            assert byte, "the browser has gone"
            text += byte
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def open(self, file, *, width, dark=False, touch=False, height=900, language="en"):
        """Show a file in a window of `width` pixels, to a reader of `language`."""
        self.call("Emulation.setUserAgentOverride", userAgent="a test", acceptLanguage=language)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=media)
        self.call("Page.navigate", url=file.absolute().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def ask(self, script):
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point(self, x, y):
        """Move the pointer there, in pixels of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x, y):
        """Touch there, long enough for the browser to make a tap of it."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        time.sleep(1)

    def picture(self, file):
        """The whole page as PNG: for people."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        file.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser():
    """A Browser, which ends with the context."""
    (theirs, send), (receive, ours) = os.pipe(), os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs, ours)]  # not 3 or 4, which become copies of them
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, open(send, "wb") as out, \
            open(receive, "rb") as back:
        process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={profile}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)))
        for end in (theirs, ours, *high):
            os.close(end)
        try:
            yield Browser(out, back)
        finally:
            process.terminate()
            process.wait()
