"""Reports in a headless browser: at the width of a phone and of a desk, light and dark.

Skipped where no Chromium is found on the PATH.
"""

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")

CONTRAST = """
(() => {
  const numbers = c => c.match(/[\\d.]+/g).map(Number);
  const parse = c => [...numbers(c), 1].slice(0, 4);
  const over = (a, b) => a.slice(0, 3).map((v, i) => v * a[3] + b[i] * (1 - a[3]));
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const lum = c => { const f = v => linear(v / 255);
    return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]); };
  const ground = e => { const layers = [];
    for (let x = e; x; x = x.parentElement) layers.push(parse(getComputedStyle(x).backgroundColor));
    return layers.reduceRight((below, layer) => over(layer, below), [255, 255, 255]); };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let worst = [99, ''];
  for (let n; n = walk.nextNode();) {
    const e = n.parentElement;
    if (!n.data.trim() || ['TITLE', 'STYLE'].includes(e.tagName.toUpperCase())) continue;
    const style = getComputedStyle(e), svg = e.closest('svg');
    const text = over(parse(svg ? style.fill : style.color), ground(e));
    const pair = [lum(text), lum(ground(e))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < worst[0]) worst = [ratio, n.data.trim().slice(0, 40)];
  }
  return worst;
})()
"""
"""The least contrast of a text and its ground on the page (WCAG 2.2, 1.4.3), and that text."""


class Browser:
    """A headless Chromium, spoken to over its DevTools pipe."""

    def __init__(self, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()
        os.set_inheritable(theirs[1], True)

        def wire() -> None:  # the browser reads commands from 3 and answers on 4
            read, write = os.dup(ours[0]), os.dup(theirs[1])
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            close_fds=False, preexec_fn=wire,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self.write, self.read = os.fdopen(ours[1], "wb"), os.fdopen(theirs[0], "rb")
        self.count, self.rest, self.session = 0, b"", None
        targets = self.do("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.do("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.do("Page.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while True:
            answer = self._message()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer.get("result", {})

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            chunk = os.read(self.read.fileno(), 1 << 16)
            assert chunk, "the browser is gone"
            self.rest += chunk
        first, _, self.rest = self.rest.partition(b"\0")
        return json.loads(first)

    def value(self, expression: str) -> Any:
        """Return what an expression is on the page."""
        return self.do("Runtime.evaluate", expression=expression, returnByValue=True)["result"][
            "value"
        ]

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Show a page in a window of this width."""
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                mobile=width < 600)  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.do("Emulation.setEmulatedMedia", features=[feature])
        self.do("Page.navigate", url=page.as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def picture(self) -> Image.Image:
        """Return the whole page, as far as it scrolls."""
        size = self.do("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.do("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self.do("Browser.close")
        self.process.wait(20)
        self.write.close()
        self.read.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("run", ["quantized", "federated"])
def test_a_page_in_a_browser(browser, pages, tmp_path, run, width, scheme):
    browser.open(pages[run], width, scheme)
    # nothing sticks out: what is wide scrolls in a box of its own
    assert browser.value("document.documentElement.scrollWidth") <= width
    ratio, text = browser.value(CONTRAST)
    assert ratio >= 4.5, text
    picture = browser.picture()
    picture.save(tmp_path / "page.png")
    if keep := os.environ.get("SDQ_SCREENSHOTS"):
        picture.save(Path(keep) / f"{run}-{width}-{scheme}.png")
    pixels = np.asarray(picture).mean(2)
    corner = pixels[:5, :5].mean()
    assert corner > 250 if scheme == "light" else corner < 40
    assert picture.size[0] == width
    assert len(np.unique(pixels[:900].round())) > 20  # something is drawn
