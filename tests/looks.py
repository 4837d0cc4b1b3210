"""Pages as a reader's browser shows them: which scroll sideways, what they load, and the contrast of their text.

    make preview && python tests/looks.py [FOLDER] [--shots FOLDER2] [--pages hooks/hessian.html,…]

Needs Chromium (`apt install chromium`). Exits with 1 when a page scrolls sideways at 390 px, asks for an address outside the site, or has text
with a contrast below 4.5 on its ground."""
import argparse
import sys
from pathlib import Path

from lal.book.figures import find_chromium
from playwright.sync_api import sync_playwright

CONTRAST = """() => {
  const light = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 }); return .2126 * r + .7152 * g + .0722 * b }
  const parse = text => { const n = (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number); return [n[0], n[1], n[2], n.length > 3 ? n[3] : 1] }
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]))
  const dark = matchMedia('(prefers-color-scheme: dark)').matches
  const ground = el => { const chain = []; for (let e = el; e; e = e.parentElement) chain.push(parse(getComputedStyle(e).backgroundColor))
    return chain.reverse().reduce((under, top) => over(top, under), dark ? [18, 18, 18] : [255, 255, 255]) }
  const worst = {}
  for (const el of document.querySelectorAll('body *')) {
    if (el.closest('svg, .plotly-graph-div') || ![...el.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !el.checkVisibility({ checkVisibilityCSS: true })) continue
    const style = getComputedStyle(el), below = ground(el), color = parse(style.color)
    color[3] *= (() => { let o = 1; for (let e = el; e; e = e.parentElement) o *= +getComputedStyle(e).opacity; return o })()
    const a = light(over(color, below)), b = light(below), ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
    const name = el.tagName.toLowerCase() + (el.className && el.className.split ? '.' + el.className.split(' ')[0] : '') + ' in ' + (el.parentElement.className || el.parentElement.tagName).toString().split(' ')[0]
    if (!(name in worst) || ratio < worst[name]) worst[name] = ratio
  }
  return worst }"""


def look(site: Path, names: list[str], shots: Path | None) -> tuple[list[str], set[str], dict[str, float]]:
    "Pages that scroll sideways at 390 px, addresses outside the site, and the lowest contrast of each kind of text."
    sideways, outside, contrast = [], set(), {}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width in (390, 1300):
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page.on("request", lambda request: outside.add(request.url) if request.url.startswith("http") else None)
                for name in names:
                    page.goto((site / name).resolve().as_uri(), wait_until="load")
                    if width == 390 and scheme == "light" and page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
                        sideways.append(f"{name} ({page.evaluate('document.documentElement.scrollWidth')} px)")
                    if width == 1300:
                        for kind, ratio in page.evaluate(CONTRAST).items():
                            contrast[f"{scheme}: {kind}"] = min(ratio, contrast.get(f"{scheme}: {kind}", 99))
                    if shots:
                        shots.mkdir(parents=True, exist_ok=True)
                        page.screenshot(path=shots / f"{name.replace('/', '_')}-{width}-{scheme}.png")
                page.close()
        browser.close()
    return sideways, outside, contrast


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("site", nargs="?", type=Path, default=Path("_preview"))
    options.add_argument("--shots", type=Path, help="save a picture of the top of each page, at both widths, light and dark")
    options.add_argument("--pages", help="some pages, by commas; all but the copies of modules if not given")
    given = options.parse_args()
    every = sorted(p.relative_to(given.site).as_posix() for p in given.site.rglob("*.html"))
    names = given.pages.split(",") if given.pages else [name for name in every if not name.startswith("source/")]
    sideways, outside, contrast = look(given.site, names, given.shots)
    low = {kind: ratio for kind, ratio in contrast.items() if ratio < 4.5}
    print(f"{len(sideways)} of {len(names)} pages scroll sideways at 390 px", *sideways, sep="\n  ")
    print(f"{len(outside)} addresses outside the site are loaded", *sorted(outside), sep="\n  ")
    if not names: sys.exit(f"no pages in {given.site}: run make preview")
    print(f"lowest contrast of text: {min(contrast.values()):.2f}", *(f"{ratio:.2f} {kind}" for kind, ratio in sorted(low.items(), key=lambda item: item[1])), sep="\n  ")
    return bool(sideways or outside or low)


if __name__ == "__main__":
    sys.exit(main())
