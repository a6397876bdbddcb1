"""A report in Firefox, driven through Marionette, which every Firefox brings along; skipped where there is none."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
import time

import pytest
from PIL import Image

from innersight.viewer.report import report
from test_viewer import opened, photograph

FIREFOX = shutil.which("firefox-esr") or shutil.which("firefox")

pytestmark = pytest.mark.skipif(FIREFOX is None, reason="no Firefox (Debian: apt-get install firefox-esr)")


class Firefox:
    """Commands are [0, number, name, arguments] in JSON, with their length in front."""

    def __init__(self, profile):
        profile.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (profile / "user.js").write_text(f'user_pref("marionette.port", {port});\n')
        self.process = subprocess.Popen(
            [FIREFOX, "--headless", "--marionette", "--no-remote", "--profile", str(profile)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.stream, self.number = self.connected(port), 0
        self.answer()
        self("WebDriver:NewSession")
        self("WebDriver:SetWindowRect", width=1280, height=980)

    def connected(self, port, seconds=60):
        for _ in range(seconds * 5):
            try:
                self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
                return self.socket.makefile("rwb")
            except OSError:
                time.sleep(0.2)
        raise TimeoutError("Firefox did not come up")

    def answer(self):
        size = b""
        while (digit := self.stream.read(1)) != b":":
            size += digit
        return json.loads(self.stream.read(int(size)))

    def __call__(self, name, **arguments):
        self.number += 1
        text = json.dumps([0, self.number, name, arguments]).encode()
        self.stream.write(b"%d:%s" % (len(text), text))
        self.stream.flush()
        _, _, error, value = self.answer()
        assert error is None, error
        return value

    def until(self, script, seconds=20):
        for _ in range(seconds * 10):
            if found := self("WebDriver:ExecuteScript", script=f"return {script}", args=[])["value"]:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{script} is not so")

    def close(self):
        self.stream.close()
        self.socket.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def firefox(tmp_path_factory):
    running = Firefox(tmp_path_factory.mktemp("firefox") / "profile")
    yield running
    running.close()


def test_a_report_opens_in_firefox(firefox, tmp_path):
    file = report(opened(), [photograph(0)], tmp_path / "r.html", methods=["gradcam"], title="in Firefox")
    firefox("WebDriver:Navigate", url=f"{file.as_uri()}#view=layer&layer=conv2&channel=3")
    assert firefox.until('document.querySelector(".channel h3")?.textContent') == "Channel 3"
    shot = base64.b64decode(firefox("WebDriver:TakeScreenshot", full=False)["value"])
    maps = Image.open(io.BytesIO(shot)).convert("RGB").crop((240, 220, 640, 420))
    assert len(maps.getcolors(1 << 20)) > 50
    firefox.until('document.querySelector("nav.tabs a[title^=Saliency]").click() || true')
    assert firefox.until('document.querySelector("article[data-method=gradcam] dl")?.textContent')
    assert firefox.until('document.querySelectorAll(".failure").length === 0')
