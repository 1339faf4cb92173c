"""Takes the picture of the server's page in docs/images: the demo model's answer to a question, the lens of each token.

    .venv/bin/python scripts/draw_page.py

Needs Playwright for Python and a Chromium of the system. Other pictures: --dark, --width 390, -o FILE.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", default=str(ROOT / "docs" / "images" / "server-page.png"))
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--figure", choices=["norm", "lens"], default="lens")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from support.browser import browsing  # type: ignore[import-not-found]  # found on the path above
    from support.served import QUESTION, serving  # type: ignore[import-not-found]

    scheme = "dark" if given.dark else "light"
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as served, browsing() as browser:
        page = browser.new_page(viewport={"width": given.width, "height": 860}, color_scheme=scheme)
        page.goto(served.url)
        page.wait_for_selector("#tree button")
        page.select_option("#of", given.figure)
        page.fill("#text", QUESTION)
        page.press("#text", "Enter")
        page.wait_for_selector("#map[aria-busy=false]")
        page.wait_for_selector("#sessions tbody button")
        page.screenshot(path=given.output, full_page=True)
    print(given.output)


if __name__ == "__main__":
    main()
