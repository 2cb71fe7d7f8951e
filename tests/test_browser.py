"""Every page in a real browser: console, weight, width, keyboard, contrast and search; from a server and a file."""

import collections
import contextlib
import functools
import gzip
import http.server
import json
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock
from test_site import BASE, PAGES, SITE, WRITTEN, parsed

from sources import ROOT, chapters

pytestmark = pytest.mark.site

PREFIX = (urlsplit(BASE).path.rstrip("/") or "/some/where") + "/"
SHOWN = [page for page in PAGES if page != "index.html"]
CHAPTERS = [f"{name}.html" for name in chapters() if (SITE / f"{name}.html").exists()]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
MEGABYTE = 1_000_000
# Seconds of its own computing until a page answers: time on the clock depends on what else a machine does. Two cores
# that others use, too, count up to twice what they count when they are idle.
PATIENCE = 2.0


class Pages(http.server.SimpleHTTPRequestHandler):
    """Serves as GitHub Pages does: below a path, text compressed, a page of the site for a wrong address."""

    compressed = re.compile(r"text/|javascript|json|xml|svg")

    def log_message(self, *args):
        """Nothing."""

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        target = SITE / path.removeprefix(PREFIX) if path.startswith(PREFIX) else None
        if target is not None and target.is_dir():
            target = target / "index.html"
        status = 200 if target is not None and target.is_file() else 404
        target = target if status == 200 else SITE / "404.html"
        kind, body = self.guess_type(target), packed(target)[0]
        self.send_response(status)
        if self.compressed.search(kind) and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = packed(target)[1]
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)


@functools.cache
def packed(path: Path) -> tuple[bytes, bytes]:
    data = path.read_bytes()
    return data, gzip.compress(data, 6)


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}{PREFIX}"
        running.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None and os.environ.get("CI"):
        pytest.fail("no Chromium on PATH: these tests must run where the site is published from")
    if path is None:
        pytest.skip("no Chromium on PATH: the browser tests did not run")
    with playwright.sync_playwright() as running:
        try:
            chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start: {error}")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def axe():
    package = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    return (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")


@dataclass
class Tab:
    """An open page and what it complained of."""

    page: object
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


@contextlib.contextmanager
def opened(browser, address: str, home: str, expect: int = 200, **settings):
    """A page with an empty cache; everything it says and asks for is listened to."""
    context = browser.new_context(**({"viewport": WIDE, "color_scheme": "light"} | settings))
    tab = Tab(context.new_page())

    def said(message):
        if message.type in ("error", "warning") and not (expect != 200 and message.location["url"] == address):
            tab.complaints.append(message.text)

    def answered(reply):
        if reply.status != (expect if reply.url == address else reply.status) or (
            reply.status >= 400 and reply.url != address
        ):
            tab.complaints.append(f"{reply.status}: {reply.url}")

    tab.page.on("console", said)
    tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.page.on("requestfailed", lambda request: tab.complaints.append(f"failed: {request.url}"))
    tab.page.on("response", answered)
    tab.page.on("request", lambda sent: None if sent.url.startswith((home, "data:")) else tab.foreign.append(sent.url))
    try:
        tab.page.goto(address, wait_until="load")
        yield tab
    finally:
        context.close()


UNFOLD = """() => {
    document.querySelectorAll("details").forEach(box => { box.open = true; });
    document.querySelectorAll(".toggle-hidden").forEach(box => box.classList.remove("toggle-hidden"));
}"""

# A picture that is loaded when it comes near may have been passed by too fast: in the end all are asked for. Whoever
# waits for a picture that never comes must not wait for ever; what is missing is found by the tests.
SCROLL = """async () => {
    for (let y = 0; y < document.documentElement.scrollHeight; y += 1200) {
        scrollTo(0, y);
        await new Promise(resolve => setTimeout(resolve, 30));
    }
    const late = [...document.images].filter(i => !i.complete && i.checkVisibility());
    late.forEach(i => { i.loading = "eager"; });
    const loaded = Promise.all(late.map(i => i.complete || new Promise(done => { i.onload = i.onerror = done; })));
    await Promise.race([loaded, new Promise(resolve => setTimeout(resolve, 20000))]);
    scrollTo(0, 0);
}"""

# A contrast is a matter of two colours and a size: of the words of code that agree in these, one is kept for axe to
# look at, the others become plain text. The boxes of a formula all have one colour: the formula becomes its text.
THIN = """() => {
    document.querySelectorAll(".katex-html").forEach(formula => { formula.textContent = formula.textContent; });
    const seen = new Set();
    const ground = element => {
        for (let e = element; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$/.test(colour)) return colour;
        }
    };
    document.querySelectorAll("pre, dt.sig").forEach(pre => {
        const under = ground(pre);
        pre.querySelectorAll("span").forEach(word => {
            if (word.children.length) return;
            const style = getComputedStyle(word);
            const look = [under, style.color, style.backgroundColor, style.fontSize, style.fontWeight].join();
            if (seen.has(look)) word.replaceWith(word.textContent);
            seen.add(look);
        });
        pre.normalize();
    });
}"""

AXE = """async (rules) => {
    const some = rules ? {runOnly: {type: "rule", values: rules}} : {};
    const found = await axe.run(document, {resultTypes: ["violations"], ...some});
    return found.violations.flatMap(violation => violation.nodes.map(
        node => `${violation.id}: ${node.target}: ${node.failureSummary.replace(/\\s+/g, " ")}`));
}"""


COLOURS = ["color-contrast", "link-in-text-block"]


def violations(tab: Tab, axe: str) -> list[str]:
    """What axe finds on an open page, in light and then, of the rules about colours, in dark: no other sees them."""
    tab.page.evaluate(UNFOLD)
    tab.page.add_style_tag(content="* { content-visibility: visible !important }")
    found = []
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        tab.page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
        if scheme == "light":
            tab.page.evaluate(axe)
            tab.page.evaluate(THIN)
        tab.page.wait_for_timeout(800)  # colours may fade, and the theme decides after a while what scrolls
        rules = None if scheme == "light" else COLOURS
        found += [f"{scheme}: {violation}" for violation in tab.page.evaluate(AXE, rules)]
    return found


@pytest.mark.parametrize("page", SHOWN)
def test_axe_finds_nothing_in_light_and_dark(page, server, browser, axe):
    address, expect = (server + page, 200) if page != "404.html" else (server + "no/such/page.html", 404)
    with opened(browser, address, server, expect) as tab:
        found = violations(tab, axe)
    assert not found, "\n".join(found[:12])


@pytest.mark.parametrize("page", ["book/index.html", "book/ewc.html", "search.html", "genindex.html"])
def test_axe_finds_nothing_on_a_phone(page, server, browser, axe):
    with opened(browser, server + page, server, viewport=NARROW) as tab:
        found = violations(tab, axe)
    assert not found, "\n".join(found[:12])


CUT = """() => {
    const formulas = [...document.querySelectorAll("div.math > .katex-display")];
    return formulas.filter(f => f.scrollWidth > f.clientWidth + 1).map(f => {
        const says = f.querySelector("annotation").textContent.trim();
        return {says, by: f.scrollWidth - f.clientWidth, reached: f.tabIndex === 0};
    });
}"""

RAW = """() => {
    const bad = [...document.querySelectorAll(".math")].filter(m => {
        const drawn = m.querySelector(".katex-html");
        return !drawn || drawn.getBoundingClientRect().width === 0 && m.offsetParent !== null;
    });
    return bad.map(m => m.textContent.slice(0, 60));
}"""

MISSING = """async () => {
    await document.fonts.ready;
    const faces = [...document.fonts].filter(f => f.status === "error").map(f => f.family);
    const pictures = [...document.images].filter(
        i => i.complete ? i.naturalWidth === 0 : i.loading === "eager" && i.checkVisibility()).map(i => i.src);
    return [...faces, ...pictures];
}"""

WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

# The ground on which a picture of the text stands, as its luminance, and what is done to it.
GROUNDS = """() => [...document.querySelectorAll(".bd-article figure img, .bd-article .cell_output img")].map(i => {
    const style = getComputedStyle(i);
    const [r, g, b, a = 1] = style.backgroundColor.match(/[\\d.]+/g).map(Number);
    return {src: i.src, light: a * (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255, filter: style.filter};
})"""


@pytest.mark.parametrize("page", SHOWN)
def test_a_page_is_whole_at_both_widths_and_in_both_schemes(page, server, browser):
    address, expect = (server + page, 200) if page != "404.html" else (server + "no/such/page.html", 404)
    problems = {}
    with opened(browser, address, server, expect) as tab:
        tab.page.evaluate(UNFOLD)
        tab.page.add_style_tag(content="* { content-visibility: visible !important }")
        tab.page.evaluate(SCROLL)
        for width in (WIDE, NARROW):
            tab.page.set_viewport_size(width)
            problems[f"wider than {width['width']} px by"] = max(tab.page.evaluate(WIDER), 0)
            cut = tab.page.evaluate(CUT)
            if width == WIDE:
                problems["formulas to be broken into lines"] = [(formula["says"], formula["by"]) for formula in cut]
            else:
                unreached = [formula["says"] for formula in cut if not formula["reached"]]
                problems["formulas that the keyboard does not scroll"] = unreached
        problems["formulas not typeset"] = tab.page.evaluate(RAW)
        problems["fonts and pictures that did not load"] = tab.page.evaluate(MISSING)
        tab.page.emulate_media(color_scheme="dark")
        tab.page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
        problems["pictures on a dark ground"] = [
            ground for ground in tab.page.evaluate(GROUNDS) if ground["light"] < 0.9 or ground["filter"] != "none"
        ]
        problems["complaints"], problems["foreign"] = tab.complaints, tab.foreign
    assert not {problem: what for problem, what in problems.items() if what}


# Each note at a formula, in pixels of the page: its box, that of the formula before it, and the right end of the text.
NOTES = """() => [...document.querySelectorAll(".beside")].map(note => {
    const place = r => [r.left, r.top + scrollY, r.right, r.bottom + scrollY];
    const box = e => place(e.getBoundingClientRect());
    const edge = document.querySelector("article").getBoundingClientRect().right;
    return {note: box(note), formula: box(note.previousElementSibling), edge, says: note.textContent};
})"""


@pytest.mark.parametrize("page", [page for page in WRITTEN if parsed(page).select(".beside")])
def test_notes_stand_in_the_margin_where_there_is_one_and_below_the_formula_elsewhere(page, server, browser):
    with opened(browser, server + page, server) as tab:
        tab.page.add_style_tag(content="* { content-visibility: visible !important }")
        for width in (390, 800, 1199, 1200, 1280, 1600):
            tab.page.set_viewport_size({"width": width, "height": 900})
            lowest = 0
            for found in tab.page.evaluate(NOTES):
                (left, top, right, bottom), formula = found["note"], found["formula"]
                assert right <= width, f"{width}: {found['says']}"
                if width < 1200:
                    assert top >= formula[3] - 12 and right <= found["edge"], f"{width}: {found['says']}"
                else:
                    assert left >= found["edge"] and top < formula[3] and bottom <= formula[3], (
                        f"{width}: {found['says']}"
                    )
                    assert top >= lowest, f"two notes in one place at {width}: {found['says']}"
                    lowest = bottom


def test_contents_that_fold_beside_a_note_unfold_for_the_keyboard(server, browser):
    page = next(page for page in CHAPTERS if parsed(page).select(".beside"))
    with opened(browser, server + page, server, reduced_motion="reduce") as tab:
        tab.page.locator(".beside").first.scroll_into_view_if_needed()
        tab.page.mouse.wheel(0, 300)  # the theme looks at the upper two thirds of the window
        contents = tab.page.locator(".bd-sidebar-secondary")
        tab.page.wait_for_function("document.querySelector('.bd-sidebar-secondary').classList.contains('hide')")
        tab.page.wait_for_timeout(600)  # it folds by and by
        folded = contents.bounding_box()["height"]
        tab.page.locator(".bd-sidebar-secondary nav a").first.focus()
        tab.page.wait_for_timeout(600)
        assert contents.bounding_box()["height"] > folded
        shown = "getComputedStyle(document.querySelector('.bd-sidebar-secondary nav.page-toc')).opacity"
        assert tab.page.evaluate(shown) == "1"


@pytest.fixture(scope="module")
def report():
    """Figures of the pages, for people: `_build/pages.json`."""
    figures: dict[str, dict] = {}
    yield figures
    target = ROOT / "_build/pages.json"
    target.parent.mkdir(exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # workers share the pages
        known = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        merged = {page: row for page, row in (known | figures).items() if page in SHOWN}
        target.write_text(json.dumps(dict(sorted(merged.items())), indent=1) + "\n", encoding="utf-8")


TIMES = """() => {
    const t = performance.getEntriesByType("navigation")[0];
    return {interactive: t.domInteractive, ready: t.domContentLoadedEventEnd, loaded: t.loadEventEnd};
}"""


@pytest.mark.parametrize("page", [page for page in SHOWN if page != "404.html"])
def test_first_load_is_small_and_soon_interactive(page, server, browser, report):
    with opened(browser, "about:blank", server) as tab:
        wire, raw = collections.Counter(), collections.Counter()
        devtools = tab.page.context.new_cdp_session(tab.page)
        devtools.send("Network.enable")
        devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
        devtools.on("Network.loadingFinished", lambda done: wire.update(sum=int(done["encodedDataLength"])))
        devtools.on("Network.dataReceived", lambda part: raw.update(sum=part["dataLength"]))

        def busy() -> float:
            metrics = devtools.send("Performance.getMetrics")["metrics"]
            return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

        before, started = busy(), time.perf_counter()
        tab.page.goto(server + page, wait_until="domcontentloaded")
        tab.page.keyboard.press("Control+K")
        tab.page.wait_for_function("document.activeElement && document.activeElement.name === 'q'")
        answered, computed = time.perf_counter() - started, busy() - before
        tab.page.wait_for_load_state("networkidle")
        first = wire["sum"], raw["sum"]
        tab.page.keyboard.press("Escape")
        tab.page.evaluate(SCROLL)
        tab.page.wait_for_load_state("networkidle")
        report[page] = {
            "first load, bytes on the wire": first[0],
            "first load, bytes uncompressed": first[1],
            "whole page, bytes on the wire": wire["sum"],
            "whole page, bytes uncompressed": raw["sum"],
            "answers a key after, s": round(answered, 3),
            "of which its own computing, s": round(computed, 3),
            **{f"{name}, s": round(value / 1000, 3) for name, value in tab.page.evaluate(TIMES).items()},
        }
    assert 0 < first[0] <= wire["sum"] <= MEGABYTE
    assert 0 < computed <= PATIENCE


# Which elements a key must reach, marked with numbers so that a visit can be ticked off. Of a group of choices it
# reaches the chosen one, and the arrows the others.
EXPECTED = """() => {
    const wanted = 'a[href], button, input, select, textarea, summary, [tabindex="0"]';
    return [...document.querySelectorAll(wanted)].filter(
        e => e.checkVisibility({visibilityProperty: true}) && !e.disabled && e.tabIndex >= 0 && !(
            e.type === "radio" && !e.checked && document.querySelector(`input[name="${e.name}"]:checked`))
    ).map((e, i) => { e.dataset.stop = i; return e.outerHTML.slice(0, 120); });
}"""

# The look of the element that has the focus, and the look that the one before has without it.
STOP = """() => {
    const look = e => {
        const own = getComputedStyle(e), box = getComputedStyle(e.closest(".sd-card") || e.parentElement);
        const of = s => [s.outlineStyle === "none" ? "" : s.outlineStyle + s.outlineWidth + s.outlineColor, s.boxShadow,
                         s.backgroundColor, s.borderColor, s.textDecorationLine, s.color].join();
        return of(own) + "|" + of(box);
    };
    const before = window.__before, e = document.activeElement;
    const same = before && before.isConnected && before !== e && look(before) === window.__look;
    const result = {same: same ? before.outerHTML.slice(0, 120) : null, stop: null, hidden: null};
    window.__before = null;
    if (!e || e === document.body) return result;
    const shown = e.matches(".sd-stretched-link") ? e.closest(".sd-card") : e;  // the link is the whole card
    const r = shown.getBoundingClientRect(), style = getComputedStyle(e);
    const inside = r.width > 0 && r.height > 0 && r.bottom > 0 && r.right > 0
        && r.top < innerHeight && r.left < innerWidth;
    if (!inside || style.visibility === "hidden" || style.opacity === "0")
        result.hidden = e.outerHTML.slice(0, 120) + JSON.stringify(r);
    result.stop = e.dataset.stop ?? "-";
    window.__before = e;
    window.__look = look(e);
    return result;
}"""


# What came near has been laid out, and the focus has been brought back onto the screen.
SETTLED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"


@pytest.mark.parametrize("page", ["404.html", "search.html", "genindex.html", *WRITTEN])
def test_the_keyboard_reaches_everything_and_the_focus_is_seen(page, server, browser):
    address, expect = (server + page, 200) if page != "404.html" else (server + "no/such/page.html", 404)
    with opened(browser, address, server, expect, reduced_motion="reduce") as tab:
        tab.page.add_style_tag(
            content="*, *::before, *::after { transition: none !important; scroll-behavior: auto !important }"
        )
        tab.page.wait_for_timeout(400)  # the theme decides what scrolls after the page has loaded
        expected = tab.page.evaluate(EXPECTED)
        tab.page.evaluate("document.activeElement.blur()")
        visited, unmarked, hidden = set(), [], []
        for _ in range(len(expected) + 20):
            tab.page.keyboard.press("Tab")
            tab.page.evaluate(SETTLED)
            seen = tab.page.evaluate(STOP)
            unmarked += [seen["same"]] if seen["same"] else []
            hidden += [seen["hidden"]] if seen["hidden"] else []
            if seen["stop"] is None and visited:
                break
            visited.add(seen["stop"])
    assert not [text for i, text in enumerate(expected) if str(i) not in visited], "no key leads there"
    assert not hidden, "has the focus, and nobody sees it"
    assert not unmarked, "looks the same with the focus"


@pytest.mark.parametrize("page", [page for page in CHAPTERS if parsed(page).select(".solution.dropdown")])
def test_a_folded_solution_opens_with_a_key(page, server, browser):
    with opened(browser, server + page, server) as tab:
        fold = tab.page.locator(".solution.dropdown").first
        button = fold.locator("button.toggle-button")
        inside = fold.locator("section > *").first
        assert not inside.is_visible()
        button.focus()
        tab.page.keyboard.press("Enter")
        inside.wait_for(state="visible", timeout=5000)


def words(page: str) -> collections.Counter:
    """The long plain words of a page's running text."""
    text = " ".join(tag.get_text(" ") for tag in parsed(page).select("article section > p"))
    return collections.Counter(re.findall(r"\b[a-z]{7,}\b", text))


@functools.cache
def telling_words() -> dict[str, str]:
    """For each chapter a word that it uses more often than any other page does."""
    counts = {page: words(page) for page in CHAPTERS}
    telling = {}
    for page, own in counts.items():
        others = collections.Counter()
        for other, count in counts.items():
            others |= count if other != page else collections.Counter()
        telling[page] = max(sorted(own), key=lambda word: own[word] - 3 * others[word])
    return telling


@pytest.mark.parametrize("page", CHAPTERS)
@pytest.mark.parametrize("place", ["server", "file"])
def test_search_finds_a_word_of_each_chapter(page, place, server, browser):
    home = server if place == "server" else SITE.resolve().as_uri() + "/"
    word = telling_words()[page]
    with opened(browser, f"{home}search.html?q={word}", home) as tab:
        result = tab.page.locator(f'#search-results a[href*="{page}"]').first
        result.wait_for(timeout=15_000)
        tab.page.wait_for_load_state("networkidle")
        assert not tab.complaints
        result.click()
        tab.page.wait_for_url(f"{home}{page}*")
        assert word in tab.page.locator("article").text_content().lower()


def test_search_opens_with_a_key_and_says_when_nothing_is_found(server, browser):
    with opened(browser, server + "book/index.html", server) as tab:
        tab.page.keyboard.press("Control+K")
        tab.page.keyboard.type("nosuchword")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_url("**/search.html?q=nosuchword*")
        tab.page.get_by_text(re.compile("did not match any documents")).wait_for(timeout=15_000)


@pytest.mark.parametrize("page", [page for page in SHOWN if page != "404.html"])
def test_a_page_works_from_a_file(page, browser):
    home = SITE.resolve().as_uri() + "/"
    with opened(browser, home + page, home, viewport=NARROW, color_scheme="dark") as tab:
        tab.page.evaluate(SCROLL)
        assert tab.page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert not tab.page.evaluate(MISSING)
        assert not tab.complaints
        assert not tab.foreign


def test_the_page_for_wrong_addresses_looks_like_the_book_and_leads_back(server, browser):
    for wrong in ("nothing", "book/no/such/page.html", "a/b/c/"):
        with opened(browser, server + wrong, server, expect=404) as tab:
            assert not tab.complaints
            assert tab.page.locator("article h1").inner_text() == "There is no page at this address"
            assert tab.page.locator("#pst-primary-sidebar .bd-links a").count() >= len(CHAPTERS)
            tab.page.get_by_role("link", name="first page").click()
            tab.page.wait_for_url(server + "book/index.html")


def test_without_scripts_a_page_can_be_read(server, browser):
    with opened(browser, server + CHAPTERS[0], server, java_script_enabled=False) as tab:
        text = tab.page.locator("article p").first
        assert text.is_visible()
        colours = tab.page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        assert colours[0] != colours[1]
        tab.page.locator(".bd-links a").first.click()
        tab.page.wait_for_url(server + "book/index.html")
