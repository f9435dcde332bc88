"""Reports as a browser shows them: everything is drawn, labels are right, and hostile texts do nothing."""

import re
import shutil
from pathlib import Path

import pytest

from dcache.cli import main
from dcache.view import page as pages
from dcache.view.data import Chapter, points

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra ci)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
ATTACK = "</script></pre><img src=x onerror=\"window.owned=1\"><a href='javascript:window.owned=1'>"
SMALL = ["compare", "--model", "tiny-llada", "--device", "cpu", "--gen-length", "16"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium, chromium-browser or google-chrome")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


class Opened:
    """A page, with all that its console said and all that it asked the network for."""

    def __init__(self, browser, file: Path, width=1280, **more):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **more)
        self.page = self.context.new_page()
        self.faults, self.requests, self.dialogs = [], [], []
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.url = file.as_uri()
        self.page.goto(self.url)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def drawn(self):
        """Scroll through the page; the names of the figures, each of which must have been drawn."""
        plots = self.page.locator(".plot")
        for i in range(plots.count()):
            plots.nth(i).scroll_into_view_if_needed()
            self.page.wait_for_function(
                "i => { const d = document.querySelectorAll('.plot')[i].dataset; return d.drawn || d.failed }", arg=i
            )
        states = plots.evaluate_all(
            "all => all.map(e => [e.id.replace('-plot', ''), !!e.dataset.drawn && !e.dataset.failed "
            "&& e.querySelectorAll('svg.main-svg').length > 0 "
            "&& e.querySelectorAll('.trace, .hm, .points, .box, .violin').length > 0])"
        )
        assert all(ok for _, ok in states), states
        return [name for name, _ in states]

    def sound(self):
        """Nothing was said on the console, nothing asked for, and the page is no wider than the window."""
        assert self.faults == []
        assert [url for url in self.requests if url != self.url and not url.startswith(("data:", "blob:"))] == []
        assert self.dialogs == []
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert self.page.evaluate("window.owned") is None
        titles = self.page.locator(".modebar-btn").evaluate_all("all => all.map(e => e.dataset.title)")
        assert [title for title in titles if re.search("share|cloud|edit", title, re.IGNORECASE)] == []
        assert self.page.locator(".plot").evaluate_all("all => all.every(e => e._context.plotlyServerURL === '')")

    def choose(self, figure, label, option):
        """Choose an option of a figure, and wait until it is drawn."""
        plot = self.page.locator(f"#{figure}-plot")
        before = plot.get_attribute("data-drawn")
        self.page.locator(f"#{figure} label", has_text=label).locator("select").select_option(label=option)
        self.page.wait_for_function(
            "([id, before]) => document.getElementById(id).dataset.drawn !== before", arg=[f"{figure}-plot", before]
        )

    def hover(self, figure, x, y):
        """Move the mouse to a place of a figure, in its own coordinates."""
        plot = self.page.locator(f"#{figure}-plot")
        plot.scroll_into_view_if_needed()
        at = plot.evaluate(
            """(plot, [x, y]) => {
              const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
              return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
            }""",
            [x, y],
        )
        self.page.mouse.move(at[0] - 40, at[1])
        self.page.mouse.move(*at, steps=4)

    def tip(self, head):
        """The label of a map, once it is that of a cell."""
        self.page.wait_for_function(
            "head => { const t = document.getElementById('tip'); return !t.hidden && t.innerText.includes(head) }",
            arg=head,
        )
        return self.page.locator("#tip").inner_text()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    more = ["--limit", "2", "--report", str(folder), "--report-texts", "1", "--measure-drift"]
    assert main([*SMALL, "--policies", "elastic,dkv", *more]) == 0
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    more = ["--limit", "1", "--repeats", "2", "--report", str(folder), "--report-texts", "1"]
    assert main([*SMALL, "--policies", "dkv", "--sweep", "dkv.interval=2,8,16", *more]) == 0
    return folder


def test_a_comparison_of_three_policies_is_drawn_in_full_and_its_labels_are_right(browser, compared):
    chapter = Chapter.read(0, compared)
    with Opened(browser, compared / pages.FILE) as opened:
        plots = opened.page.locator(".plot")
        assert plots.last.get_attribute("data-drawn") is None  # lazily
        names = ["tradeoff", "maps", "commits", "drift", "drift-steps", "step-times", "split"]
        assert opened.drawn() == [f"run1-{name}" for name in names]

        recording = chapter.recordings[chapter.problems[0], "elastic"]
        step = next(i for i, refresh in enumerate(recording.refresh) if not refresh)
        at = recording.commits[step][0]
        opened.hover("run1-maps", at, step)
        told = opened.tip(f"step {step}, position {at}")
        sure = dict(zip(recording.candidates[step].at, recording.candidates[step].confidence, strict=True))[at]
        piece = recording.piece(recording.canvas[at - recording.n_prompt])
        rows = recording.row_layers[step] / recording.n_layers
        for expected in (
            f"generated token {at - recording.n_prompt}, block 1",
            f"“{piece.replace(' ', '␣')}” committed now",
            f"{recording.n_layers} of {recording.n_layers} layers computed",
            f"{round(rows, 1):g} of {recording.length} rows",
            "refresh: no",
            f"confidence {sure:.3f}",
        ):
            assert expected in told
        opened.hover("run1-maps", 0, 0)
        told = opened.tip("step 0, position 0")
        assert "refresh: yes" in told
        assert "prompt token 0" in told

        opened.choose("run1-maps", "view", "layer × step")
        opened.hover("run1-maps", 0, 2)
        label = opened.page.locator("#run1-maps .hoverlayer .hovertext").first
        assert "100.0% of the rows" in label.text_content()

        (point,) = (p for p in points(chapter) if p.entrant.policy == "dkv")
        opened.choose("run1-tradeoff", "speed", "rows computed")
        opened.hover("run1-tradeoff", point.values["row_share"], point.values["accuracy"])
        label = opened.page.locator("#run1-tradeoff .hoverlayer .hovertext", has_text="dkv").first.text_content()
        assert f"rows computed: {100 * point.values['row_share']:.1f} %" in label
        opened.sound()


def test_the_figures_follow_the_colours_of_the_system(browser, compared):
    colour = "e => getComputedStyle(e.querySelector('.xtick text')).fill"
    with Opened(browser, compared / pages.FILE, color_scheme="light") as opened:
        opened.drawn()
        plot = opened.page.locator("#run1-tradeoff-plot")
        light, paper = plot.evaluate(colour), opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        opened.page.emulate_media(color_scheme="dark")
        opened.page.wait_for_function(
            f"before => ({colour})(document.querySelector('#run1-tradeoff-plot')) !== before", arg=light
        )
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
        opened.sound()


def test_a_sweep_is_drawn_on_a_phone_and_nothing_is_wider_than_it(browser, swept):
    with Opened(browser, swept / pages.FILE, width=390) as opened:
        assert "run1-sweeps" in opened.drawn()
        curve = opened.page.locator("#run1-tradeoff-plot").evaluate(
            "plot => plot.data.filter(t => t.mode === 'lines+markers').map(t => [t.name, t.x.length])"
        )
        assert curve == [["dkv (interval)", 3]]
        point = points(Chapter.read(0, swept))[-1]
        opened.hover("run1-sweeps", 16, point.values["accuracy"])
        label = opened.page.locator("#run1-sweeps .hoverlayer .hovertext", has_text="dkv").first.text_content()
        assert "interval: 16" in label
        assert f"tok/s: {point.values['tok_s']:.1f}" in label
        opened.sound()


def test_texts_of_an_attacker_do_nothing(browser, made, tmp_path):
    names = ["none", f"p{ATTACK}"]
    entrants = [made.entrant("none"), made.entrant(names[1], ATTACK, unmask=ATTACK, knob=1)]
    results = [made.result(n, ATTACK, text=ATTACK, canvas=(i, 2, 3, 4)) for i, n in enumerate(names, 1)]
    recordings = [
        made.recording(
            n, ATTACK, question=ATTACK, answer=ATTACK, pieces=dict.fromkeys(range(10), ATTACK), text=ATTACK, ends=[]
        )
        for n in names
    ]
    conditions = made.conditions(*entrants, model=ATTACK, task=ATTACK, device_name=ATTACK)
    made.save(tmp_path, conditions, results, recordings)
    file = pages.write([tmp_path], tmp_path / "report.html")
    with Opened(browser, file) as opened:
        opened.drawn()
        opened.hover("run1-maps", 4, 1)
        assert ATTACK.replace(" ", "␣") in opened.tip("step 1, position 4")
        opened.hover("run1-commits", 2, 1)
        opened.page.wait_for_selector("#run1-commits .hoverlayer .hovertext")
        assert ATTACK in opened.page.locator(".text pre").first.inner_text()
        assert opened.page.locator("img, a[href*=javascript]").count() == 0
        opened.sound()


def test_a_script_that_found_its_way_in_would_not_run(browser, made, tmp_path):
    """The second wall, tried with the first one taken away."""
    made.save(tmp_path, made.conditions(made.entrant("none")), [made.result("none")])
    text = pages.render([tmp_path]).replace(
        "<main>", "<main><script>window.owned=1</script><img src=x onerror='window.owned=1'>"
    )
    (tmp_path / "open.html").write_text(text)
    with Opened(browser, tmp_path / "open.html") as opened:
        opened.drawn()
        assert opened.page.evaluate("window.owned") is None
        assert any("Content Security Policy" in fault for fault in opened.faults)
