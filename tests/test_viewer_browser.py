"""The viewer in a real browser (Debian's Chromium): a report from disk, the live page, a notebook's frame."""

from __future__ import annotations

import re
import shutil
import time

import numpy as np
import pytest

from innersight.viewer.report import report
from innersight.viewer.session import Session
from test_viewer import HOSTILE, opened, photograph

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
READY = 'html[data-ready="1"]'

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)")
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def page(browser):
    """A page that must say nothing on the console and ask for nothing beyond what it was given."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    shown = context.new_page()
    shown.said, shown.asked = [], []
    shown.on("console", lambda m: shown.said.append(m.text) if m.type in ("error", "warning") else None)
    shown.on("pageerror", lambda e: shown.said.append(str(e)))
    shown.on("request", lambda r: shown.asked.append(r.url))
    yield shown
    assert not shown.said
    context.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return report(opened(), [photograph(0), photograph(1)], tmp_path_factory.mktemp("r") / "r.html",
                  methods=["gradcam", "gradient_x_input"], title="a small one")  # fmt: skip


def visit(page, address):
    page.goto(address)
    page.wait_for_selector(READY, state="attached")


def colored(page, selector):
    """How many colors a canvas shows: from a screenshot, since scripts of ours may not be evaluated in the page."""
    import io

    from PIL import Image

    shot = Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert("RGB")
    return len(shot.getcolors(1 << 20))


def test_a_report_opens_from_disk_and_asks_for_nothing(page, written):
    visit(page, written.as_uri())
    assert page.inner_text("h1") == "a small one"
    page.wait_for_selector(".card canvas")
    names = page.locator(".card b").all_inner_texts()
    assert names[0] == "conv1"
    assert "fc" in names
    assert {a.partition(":")[0] for a in page.asked} <= {"file", "data", "blob"}
    top = page.locator("aside .bars .name").all_inner_texts()
    assert top == [n for n, _ in opened().predict([photograph(0)]).top(5)[0]]
    assert colored(page, ".card canvas") > 8


def test_maps_fields_and_pixels(page, written):
    visit(page, written.as_uri() + "#view=layer&layer=conv2&size=64")
    net = opened()
    page.wait_for_selector(".inspector .picture")
    assert page.inner_text(".main h2") == "conv2"
    assert "8×16×20" in page.inner_text(".main header")
    box = page.locator(".grid canvas").first.bounding_box()
    at = (box["x"] + 6 + 3 * 7.5, box["y"] + 6 + 3 * 8.5)  # a cell of the first tile: 3 pixels a cell
    page.mouse.move(*at)
    page.mouse.click(*at)
    page.wait_for_selector(".channel")
    page.mouse.move(at[0] + 0.5, at[1])
    page.wait_for_timeout(200)
    found = re.match(r"channel (\d+), row (\d+), column (\d+): (\S+)", page.inner_text(".status"))
    channel, row, column = (int(v) for v in found.groups()[:3])
    maps = net.maps([photograph(0)], ["conv2"])["conv2"][0]
    strongest = np.square(maps).mean((1, 2)).argmax()
    assert channel == strongest  # sorted by activity, so it stands first
    assert (row, column) == (8, 7)
    step = np.ptp(maps[channel]) / 255
    assert float(found.group(4)) == pytest.approx(maps[channel, row, column], abs=float(step + 0.006 * abs(maps).max()))
    top, left, bottom, right = net.layers["conv2"].receptive_field.box(row, column, clip=False)
    assert f"This cell sees {bottom - top}×{right - left} pixels" in page.inner_text(".cell")
    assert page.inner_text(".channel h3") == f"Channel {channel}"
    assert page.locator(".filters canvas").count() == 6
    picture = page.locator(".inspector .picture .over").bounding_box()
    page.mouse.click(picture["x"] + picture["width"] * 10.5 / 40, picture["y"] + picture["height"] * 20.5 / 32)
    page.wait_for_timeout(300)
    said = page.inner_text(".cell")
    field = net.layers["conv2"].receptive_field
    rows = [y for y in range(16) if field.box(y, 0)[0] <= 20 < field.box(y, 0)[2]]
    columns = [x for x in range(20) if field.box(0, x)[1] <= 10 < field.box(0, x)[3]]
    assert said == (f"Rows {rows[0]}–{rows[-1]} and columns {columns[0]}–{columns[-1]} of this layer look at "
                    "pixel (10, 20).")  # fmt: skip


@pytest.mark.parametrize("sort", ["index", "maximum", "zeros", "relevance"])
def test_maps_are_sorted_by_what_was_chosen(page, written, sort):
    layer = "relu" if sort == "zeros" else "conv2"
    visit(page, written.as_uri() + f"#view=layer&layer={layer}&sort={sort}")
    page.wait_for_selector(".inspector .picture")
    page.locator(".grid").focus()
    page.keyboard.press("Home")
    page.wait_for_selector(".channel")
    session = Session([opened()], [photograph(0)])
    maps = session.values(0, 0, [layer])[layer]
    by = {
        "index": lambda: -np.arange(len(maps)), "maximum": lambda: maps.max((1, 2)),
        "zeros": lambda: -(maps == 0).mean((1, 2)),
        "relevance": lambda: session.relevance(0, 0, [layer], session._targets[0][0])[layer],
    }[sort]()  # fmt: skip
    assert page.inner_text(".channel h3") == f"Channel {int(np.argmax(by))}"
    page.keyboard.press("End")
    page.wait_for_timeout(200)
    assert by[int(page.inner_text(".channel h3").split()[1])] == by.min()


def test_the_address_holds_the_view(page, written):
    visit(page, written.as_uri())
    page.keyboard.press("2")
    page.wait_for_selector(".inspector .picture")
    for key in ("j", "n", "+", "]"):
        page.keyboard.press(key)
        page.wait_for_timeout(100)
    address = page.url
    assert "view=layer" in address
    assert "scale=each" in address
    assert "input=1" in address
    before = page.inner_text(".main header"), page.inner_text(".inspector h3")
    page.goto("about:blank")
    visit(page, address)
    page.wait_for_selector(".inspector .picture")
    assert (page.inner_text(".main header"), page.inner_text(".inspector h3")) == before
    page.keyboard.press("1")
    page.wait_for_selector(".card")
    page.go_back()
    page.wait_for_selector(".inspector .picture")


def test_saliency_stands_beside_its_verdict(page, written):
    visit(page, written.as_uri() + "#view=saliency")
    page.wait_for_selector("article[data-method=gradient_x_input] dl")
    want = opened().explain([photograph(0)], "gradient_x_input")
    card = page.inner_text("article[data-method=gradient_x_input]")
    assert str(want.scale(0)) in card
    assert "score" in card
    assert f"for {want.targets[0]}" in card
    before = page.locator("article[data-method=gradcam] .picture").screenshot()
    page.keyboard.press("m")
    page.wait_for_selector("article[data-method=gradcam] dl")
    page.wait_for_timeout(200)
    assert page.locator("article[data-method=gradcam] .picture").screenshot() != before
    for key in ("o", "o", "p", "m", "m"):
        page.keyboard.press(key)
    page.wait_for_timeout(300)


def test_names_are_text_on_the_page(page, tmp_path):
    net = opened([HOSTILE, "b", "c", "d", "e"])
    folder = tmp_path / "pictures"
    folder.mkdir()
    photograph(0).save(folder / "<img src=x onerror=document.title=1>.png")
    file = report(net, [folder], tmp_path / "r.html", methods=["gradient"], title=HOSTILE)
    visit(page, file.as_uri())
    page.wait_for_selector(".card canvas")
    assert page.inner_text("h1") == HOSTILE
    assert page.title() == HOSTILE
    assert HOSTILE in page.inner_text("aside")
    assert page.locator("img").count() == 0


def test_scripts_that_are_not_ours_do_not_run(browser, written, tmp_path):
    """Should a name ever get through as markup, the policy still stops it."""
    text = written.read_text().replace("</body>", "<script>document.title = 'run'</script></body>")
    text = text.replace('<div id="app">', '<div id="app"></div><img src="x" onerror="document.title=\'run\'"><div>')
    (tmp_path / "bad.html").write_text(text)
    page = browser.new_page()
    page.goto((tmp_path / "bad.html").as_uri())
    page.wait_for_timeout(800)
    assert page.title() == "a small one"
    page.close()


def test_both_themes_and_narrow_screens(browser, written):
    for scheme, width in (("dark", 1280), ("light", 400)):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        for view in ("overview", "layer", "saliency"):
            page.goto("about:blank")
            visit(page, written.as_uri() + f"#view={view}")
            page.wait_for_timeout(300)
            box = page.locator("body").bounding_box()
            assert box["width"] <= width
            assert page.locator("html").get_attribute("data-theme") == scheme
        context.close()


def test_two_networks_side_by_side(page, tmp_path):
    import torch

    other = opened()
    with torch.no_grad():
        other.module.conv2.weight += 0.02
    file = report([opened(), other], [photograph(0)], tmp_path / "r.html", methods=[])
    visit(page, file.as_uri() + "#view=compare&layer=conv2")
    page.wait_for_selector(".pairs canvas")
    rail = page.inner_text(".rail")
    assert re.search(r"conv1\s+equal", rail)
    assert re.search(r"conv2\s+[\d.]+ dB", rail)
    cell = page.locator(".pairs canvas").first.bounding_box()
    page.mouse.move(cell["x"] + cell["width"] / 2, cell["y"] + cell["height"] / 2)
    page.wait_for_selector(".linked .cursor")
    assert page.locator(".linked").count() == 3
    assert re.search(r"channel \d+: \S+ in .*, \S+ in ", page.inner_text(".status"))


@pytest.fixture
def live():
    pytest.importorskip("uvicorn")
    from innersight.viewer.server import Server

    with Server(Session([opened()], [photograph(0)])) as running:
        time.sleep(0.3)
        yield running


def test_the_live_page_computes_on_demand(page, live):
    visit(page, live.address)
    assert "token" not in page.url
    page.keyboard.press("3")
    page.wait_for_selector("article[data-method=gradcam] dl")
    page.wait_for_selector("article[data-method=smoothgrad] dl")
    page.get_by_label("add").select_option("gradient_x_input")
    page.wait_for_selector("article[data-method=gradient_x_input] dl")
    page.get_by_label("and not").select_option(label="eel" if "eel" in page.inner_text("select >> nth=1") else "fox")
    page.wait_for_selector("article[data-method=gradcam] >> text=and not")
    picture = page.locator("aside .over").bounding_box()
    page.mouse.move(picture["x"] + 30, picture["y"] + 30)
    page.mouse.down()
    page.mouse.move(picture["x"] + 150, picture["y"] + 120)
    page.mouse.up()
    page.wait_for_selector("aside [aria-live] .bars")
    assert "was" in page.inner_text("aside [aria-live] .bars")
    assert all(a.startswith((f"http://127.0.0.1:{live.port}/", "data:", "blob:")) for a in page.asked)


def test_a_picture_is_added_on_the_page(page, live, tmp_path):
    photograph(5).save(tmp_path / "new.png")
    visit(page, live.address)
    page.set_input_files("input[type=file]", tmp_path / "new.png")
    page.wait_for_selector(".strip [data-input='1'][aria-selected=true]")
    want = opened().predict([photograph(5)]).top(1)[0][0][0]
    assert page.inner_text(".strip [data-input='1'] small") == want
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.set_input_files("input[type=file]", tmp_path / "bad.png")
    page.wait_for_selector(".failure")
    assert "not a picture" in page.inner_text(".failure")
    page.said = [s for s in page.said if "422" not in s]  # the browser's own note about the refusal


def test_the_page_in_a_frame_of_a_notebook(page, tmp_path):
    from innersight.viewer.notebook import Page

    shown = Page(Session([opened()], [photograph(0)]), methods=["gradient"])
    (tmp_path / "n.html").write_text(f"<!doctype html><meta charset=utf-8><body>{shown._repr_html_()}</body>")
    page.goto((tmp_path / "n.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator(".card canvas").first.wait_for()
    frame.get_by_text("Saliency", exact=True).click()
    frame.locator("article[data-method=gradient] dl").wait_for()
    assert "1 pictures" in repr(shown)
