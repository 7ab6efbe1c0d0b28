"""The pictures of the report that the documentation shows, from a run's folder:

    python -m benchmarks.screenshots runs/quickstart --into docs/assets
    python -m benchmarks.screenshots runs/quickstart --into docs/assets --site site

The report is made anew from the run's files, without training. Needs Chromium; writes `token_view.png`,
`report_light.png`, `report_dark.png`, `report_phone.png` and, with a built site, `docs_home.png`.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.browser import Browser
from opd.report import write_report

COLOURS = 256
"""Of the palette of a picture that would be too large without one."""
LARGEST = 250_000
"""Bytes of a picture."""

CARD = "document.querySelector('#rollouts .card')"
FAR = """(() => {
  const tokens = [...document.querySelectorAll('#rollouts .card .t')].slice(0, 400);
  const strength = (one) => Number(one.style.getPropertyValue('--strength'));
  return tokens.indexOf(tokens.reduce((a, b) => (strength(b) > strength(a) ? b : a)));
})()"""
"""The number of the token with the strongest colour among the first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--into", type=Path, default=Path("docs/assets"), help="folder of the pictures")
    parser.add_argument("--site", type=Path, help="folder of the built documentation, for a picture of its home page")
    asked = parser.parse_args()
    asked.into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = write_report([asked.run], Path(folder) / "report.html").resolve()
        browser = Browser(Path(folder) / "profile")
        try:
            for name, taken in take(browser, page).items():
                keep(asked.into / f"{name}.png", taken)
            if asked.site is not None:
                browser.colours(dark=False)
                browser.size(1280, 860)
                browser.open((asked.site / "index.html").resolve().as_uri(), "true")
                keep(asked.into / "docs_home.png", browser.picture())
        finally:
            browser.close()


def take(browser: Browser, page: Path) -> dict[str, bytes]:
    """PNGs of a report by name, as Chromium makes them."""
    found = {}
    for dark in (False, True):
        browser.colours(dark)
        browser.size(1280, 1500)
        opened(browser, page)
        found["report_dark" if dark else "report_light"] = browser.picture()
    browser.colours(dark=False)
    browser.size(1180, 1100)
    opened(browser, page)
    beside(browser)
    point(browser)
    found["token_view"] = browser.picture(around(browser, ["#rollouts .scale", "#rollouts .card", "#rollouts .panel"]))
    browser.size(390, 844, mobile=True)
    opened(browser, page)
    found["report_phone"] = browser.picture()
    return found


def opened(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.until("performance.getEntriesByName('opd charts ready').length > 0")


def beside(browser: Browser) -> None:
    """Show the first and the last step beside each other, the prompt first that changed most."""
    browser.run("document.querySelector('#rollouts [data-mode=pairs]').click()")
    browser.until("document.querySelectorAll('#rollouts .pair').length > 0")
    browser.run(
        "(() => { const order = document.querySelector('#rollouts [data-control=order]'); order.value = 'fall';"
        "order.dispatchEvent(new Event('change')) })()"
    )
    # It is drawn when its rows are decoded.
    browser.run("new Promise((done) => setTimeout(done, 300))")


def point(browser: Browser) -> None:
    """Show the panel of the token where student and teacher are furthest apart."""
    at = browser.run(FAR)
    browser.point_at(f"document.querySelectorAll('#rollouts .card .t')[{at}]")
    browser.until("document.querySelector('#rollouts .t[aria-selected=true]') !== null")


def around(browser: Browser, selectors: list[str], margin: float = 16) -> dict[str, float]:
    """The smallest part of the page that holds the first element of each selector."""
    boxes = [browser.run(f"document.querySelector({one!r}).getBoundingClientRect().toJSON()") for one in selectors]
    down = browser.run("scrollY")
    left, top = min(box["left"] for box in boxes) - margin, min(box["top"] for box in boxes) - margin
    right, bottom = max(box["right"] for box in boxes) + margin, max(box["bottom"] for box in boxes) + margin
    return {"x": left, "y": top + down, "width": right - left, "height": bottom - top}


def keep(path: Path, taken: bytes) -> None:
    """Write a picture: in full colour where that is small enough, else with a palette of its own."""
    image = Image.open(io.BytesIO(taken)).convert("RGB")
    image.save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    if size > LARGEST:
        raise SystemExit(f"{path} has {size} bytes, more than {LARGEST}: show less of the page")
    print(f"{path}: {image.width} x {image.height}, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
