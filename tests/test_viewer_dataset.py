"""A data set on the page: what is told of a scan, by key, in a report, and in the browser."""

from __future__ import annotations

import json

import numpy as np
import pytest

import innersight
from innersight import errors
from innersight.viewer import chunks
from innersight.viewer.dataset import DataSet, matched
from innersight.viewer.keys import key
from innersight.viewer.report import report, written
from innersight.viewer.server import Server
from innersight.viewer.session import Session
from test_viewer import ask, blocks, opened, photograph, told
from test_viewer_browser import browser, colored, needs_chromium, page, visit  # noqa: F401

pytest.importorskip("pandas")
CLASSES = ("cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty pictures, in folders of their labels; one that cannot be read."""
    place = tmp_path_factory.mktemp("photos")
    for n in range(40):
        (place / CLASSES[n % 5]).mkdir(exist_ok=True)
        photograph(n).save(place / CLASSES[n % 5] / f"{n:02}.png")
    (place / "eel" / "broken.png").write_bytes(b"no picture")
    return place


@pytest.fixture(scope="module")
def scan(folder, tmp_path_factory):
    return innersight.scan(opened(), folder, tmp_path_factory.mktemp("scans") / "s", top=4)


@pytest.fixture(scope="module")
def session(scan, folder):
    return Session([opened()], [photograph(0)], scan=scan, data=folder)


def test_channels_are_those_of_the_scan(session, scan):
    arrays, _ = chunks.unpack(session.get(key("channels", 0, "conv2")))
    table = scan.channels("conv2")
    for name in ("mean", "max", "zeros", "fires", "selectivity", "median"):
        np.testing.assert_allclose(arrays[name], table[name], rtol=1e-6)
    assert [CLASSES[k] for k in arrays["class"]] == list(table["class"])
    assert arrays["nearest"].tolist() == table["nearest"].tolist()
    top = scan.top("conv2", 3)
    assert arrays["top_image"][3].tolist() == top["image"].tolist()
    np.testing.assert_allclose(arrays["top_value"][3], top["value"], rtol=1e-6)
    names = dict(zip(arrays["named"].tolist(), arrays["names"].tobytes().decode().split("\0"), strict=True))
    assert [names[i] for i in arrays["top_image"][3]] == top["name"].tolist()
    counts, edges = scan.histogram("conv2", 3)
    drawn = np.rint(255 * np.sqrt(counts / counts.max()))
    first = int(np.flatnonzero(edges[:, 0] == arrays["edges"][0, 0])[0])
    assert arrays["histogram"][3].tolist() == drawn[first : first + arrays["histogram"].shape[1]].tolist()
    assert arrays["histogram"].any(0)[[0, -1]].all()


def test_crops_are_those_of_the_scan(session, scan):
    file = scan.folder / "crops" / f"{scan.layers.index('conv2'):03}" / "00003.jpg"
    assert session.get(key("strip", 0, "conv2", 3)) == file.read_bytes()
    with pytest.raises(errors.InputError, match="0 to 7, not 99"):
        session.get(key("strip", 0, "conv2", 99))
    with pytest.raises(errors.UnknownName):
        session.get(key("strip", 0, "../../etc", 0))


def test_images_come_wrong_ones_first(session, scan):
    arrays, about = chunks.unpack(session.get(key("images", 0)))
    table = scan.images().set_index("image")
    assert about["of"] == len(table) == 40
    assert sorted(arrays["image"]) == sorted(table.index)
    names = arrays["names"].tobytes().decode().split("\0")
    assert names == [table["name"][i] for i in arrays["image"]]
    wrong = arrays["label"] != arrays["prediction"]
    assert (np.diff(wrong.astype(int)) <= 0).all()
    assert (np.diff(arrays["confidence"][wrong]) <= 0).all()
    assert (np.diff(arrays["confidence"][~wrong]) >= 0).all()
    np.testing.assert_allclose(arrays["confidence"], [table["confidence"][i] for i in arrays["image"]], rtol=1e-6)


def test_what_is_told_to_begin_with(session, scan):
    about = session.manifest()["scans"][0]
    json.dumps(about, allow_nan=False)
    pairs = scan.images()
    counted = {(a, b): int(n) for (a, b), n in pairs.groupby(["label", "prediction"]).size().items()}
    assert {(CLASSES[a], CLASSES[b]): n for a, b, n in about["confusion"]} == counted
    assert about["accuracy"] == pytest.approx((pairs["label"] == pairs["prediction"]).mean())
    assert about["skipped"] == 1
    assert [one["kind"] for one in about["findings"]] == [one.kind for one in scan.findings()]
    for n, one in enumerate(scan.findings()):
        if one.picture:
            assert session.get(key("gallery", 0, n)) == (scan.folder / one.picture).read_bytes()
        else:
            with pytest.raises(errors.UnknownName):
                session.get(key("gallery", 0, n))


def test_an_image_of_the_data_set_becomes_a_picture(scan, folder):
    session = Session([opened()], scan=scan, data=folder)
    row = scan.images().iloc[7]
    assert session.add_scanned(0, int(row["image"])) == 0
    assert session.add_scanned(0, int(row["image"])) == 0
    assert len(session.pictures) == 1
    assert session.pictures[0].label == row["label"]
    assert session.manifest()["inputs"][0]["predictions"][0]["top"][0][1] == row["prediction"]
    broken = int(scan.skipped()["image"].iloc[0])
    with pytest.raises(errors.InputError, match=r"broken\.png"):
        session.add_scanned(0, broken)
    with pytest.raises(errors.InputError, match="--data"):
        Session([opened()], scan=scan).add_scanned(0, 3)


def test_a_scan_belongs_to_weights(scan, folder, tmp_path):
    import torch

    other = opened()
    with torch.no_grad():
        other.module.conv1.weight.add_(1)
    with pytest.raises(errors.InputError, match="other weights"):
        Session([other], scan=scan)
    assert matched([other, opened()], scan.folder)[0] is None
    assert matched([other, opened()], [scan])[1].scan is scan
    with pytest.raises(errors.InputError, match="two scans are of the same network"):
        matched([opened()], [scan, scan])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_bytes((scan.folder / "manifest.json").read_bytes())
    with pytest.raises(errors.InputError, match=r"channels\.parquet is missing"):
        matched([opened()], tmp_path / "broken")
    with pytest.raises(errors.InputError, match="give scan="):
        Session([opened()], data=folder)
    (tmp_path / "a").mkdir()
    photograph(1).save(tmp_path / "a" / "1.png")
    with pytest.raises(errors.InputError, match="not the data set that was scanned"):
        Session([opened()], scan=scan, data=tmp_path)
    with pytest.raises(errors.InputError, match="no scan"):
        Session([opened()], scan=tmp_path)


def test_a_scan_of_the_first_images_knows_the_whole_set(folder, tmp_path):
    part = innersight.scan(opened(), folder, tmp_path / "s", limit=12)
    assert DataSet(part, matched([opened()], part, folder)[0].source).source.size == 12


def test_without_a_scan_there_is_none():
    session = Session([opened()], [photograph(0)])
    assert session.manifest()["scans"] == [None]
    for asked in (key("images", 0), key("channels", 0, "conv1"), key("gallery", 0, 0), key("images", 5)):
        with pytest.raises(errors.UnknownName):
            session.get(asked)


def test_effective_fields_are_the_layers(session):
    box, _ = chunks.unpack(session.get(key("effective", 0, "conv2")))
    assert box["box"].tolist() == list(opened().layers["conv2"].effective_receptive_field([photograph(0)]))
    with pytest.raises(errors.Unsupported):
        session.get(key("effective", 0, "fc"))


def test_a_report_holds_the_data_set_within_its_size(scan, tmp_path):
    content = report(opened(), [photograph(0)], tmp_path / "r.html", methods=[], scan=scan).read_bytes()
    found = blocks(content)
    for name in scan.layers:
        assert key("channels", 0, name) in found
        assert all(key("strip", 0, name, c) in found for _, c in DataSet(scan).strips() if _ == name)
    assert key("images", 0) in found
    layer = next(one for one in told(content)["networks"][0]["layers"] if one["name"] == "conv2")
    assert layer["effective"] == list(opened().layers["conv2"].effective_receptive_field([photograph(0)]))
    small = Session([opened()], [photograph(0)], scan=scan)
    limit = 190_000
    tight = written(small, [], limit, lambda *_: None)
    assert len(tight) <= limit
    kept = blocks(tight)
    assert key("images", 0) in kept
    assert sum(k.startswith("strip/") for k in kept) < sum(k.startswith("strip/") for k in found)


# -- in the browser


@pytest.fixture(scope="module")
def live(scan, folder):
    with Server(Session([opened()], [photograph(0)], scan=scan, data=folder)) as server:
        yield server


def test_the_server_opens_images_by_their_number_alone(live):
    answer, body = ask(live, "/api/scanned", "POST", json.dumps({"network": 0, "image": 5}))
    assert answer.status == 200
    assert json.loads(body)["label"] in CLASSES
    for asked in ({"network": 0, "image": "../x"}, {"network": 3, "image": 1}, {"network": 0, "image": 10**6}, [1]):
        answer, body = ask(live, "/api/scanned", "POST", json.dumps(asked))
        assert answer.status in (404, 422), asked
        assert json.loads(body)["error"]


@needs_chromium
def test_errors_are_looked_at_from_the_list(page, live, scan):  # noqa: F811
    visit(page, live.address)
    page.keyboard.press("4")
    page.wait_for_selector(".finding")
    assert page.locator(".finding h3").all_inner_texts() == [f.kind for f in scan.findings()]
    page.get_by_role("button", name="Images", exact=True).click()
    page.wait_for_selector("table.list tbody tr")
    assert page.locator("table.list tbody tr").count() == 40
    page.locator("label", has_text="shown").locator("select").select_option("wrong")
    table = scan.images()
    wrong = table[table["label"] != table["prediction"]]
    page.wait_for_selector(f"text={len(wrong)} of {len(wrong)} are listed")
    a, b = wrong.groupby(["label", "prediction"]).size().idxmax()
    same = wrong[(wrong["label"] == a) & (wrong["prediction"] == b)]
    page.locator(".matrix button", has_text=str(len(same))).and_(
        page.get_by_label(f"{a} taken for {b}: {len(same)}")
    ).click()
    page.wait_for_selector(f"text={a} taken for {b} >> visible=true")
    assert page.locator("table.list tbody tr").count() == len(same)
    name = page.locator("table.list tbody button").first.inner_text()
    page.locator("table.list tbody button").first.click()
    page.wait_for_selector('.saliency[data-method="gradcam"] dl')
    assert "view=saliency" in page.url
    assert page.locator('.strip [aria-selected="true"] b').inner_text() == name


@needs_chromium
def test_channels_of_a_data_set_and_one_of_them(page, tmp_path, scan):  # noqa: F811
    file = report(opened(), [photograph(0)], tmp_path / "r.html", methods=["gradcam"], scan=scan)
    visit(page, file.as_uri() + "#view=dataset&part=channels&layer=conv2&order=selectivity")
    page.wait_for_selector(".strips canvas")
    assert colored(page, ".strips canvas") > 8
    order = scan.channels("conv2").sort_values("selectivity", ascending=False, kind="stable")["channel"]
    assert page.locator(".strips li > button").all_inner_texts() == [f"channel {c}" for c in order]
    page.locator(".strips li > button").first.click()
    page.wait_for_selector(".over-data canvas")
    best = int(order.iloc[0])
    assert page.inner_text(".channel h3") == f"Channel {best}"
    names = scan.top("conv2", best)["name"]
    assert names.iloc[0].rpartition("/")[2] in page.inner_text(".over-data")
    said = page.inner_text(".over-data")
    assert f"highest for {scan.channels('conv2')['class'][best]}" in said


@needs_chromium
def test_a_pages_without_pictures_shows_the_data_set(page, scan):  # noqa: F811
    with Server(Session([opened()], scan=scan)) as server:
        visit(page, server.address)
        page.keyboard.press("4")
        page.wait_for_selector(".finding")
        page.get_by_role("button", name="Channels", exact=True).click()
        page.wait_for_selector(".strips canvas")


@needs_chromium
def test_the_grid_has_a_table_with_the_same_numbers(page, tmp_path):  # noqa: F811
    file = report(opened(), [photograph(0)], tmp_path / "r.html", methods=[])
    visit(page, file.as_uri() + "#view=layer&layer=conv2&sort=maximum")
    page.wait_for_selector(".inspector .picture")
    page.locator("label", has_text="as").locator("select").first.select_option("table")
    page.wait_for_selector("table.list")
    maps = opened().maps([photograph(0)], ["conv2"])["conv2"][0]
    order = np.argsort(-maps.max((1, 2)), kind="stable")
    rows = page.locator("table.list tbody tr")
    assert page.locator("table.list tbody button").all_inner_texts() == [str(c) for c in order]
    first = rows.first.locator("td").all_inner_texts()
    assert float(first[0]) == pytest.approx(maps[order[0]].max(), rel=5e-3)
    assert float(first[1]) == pytest.approx(maps[order[0]].mean(), rel=5e-3)
    y, x = np.unravel_index(maps[order[0]].argmax(), maps.shape[1:])
    assert first[-1] == f"row {y}, column {x}"
    page.locator("table.list tbody button").nth(2).click()
    page.wait_for_selector(".channel")
    assert page.inner_text(".channel h3") == f"Channel {order[2]}"


@needs_chromium
def test_most_of_what_moves_a_cell_is_drawn_with_it(page, tmp_path):  # noqa: F811
    file = report(opened(), [photograph(0)], tmp_path / "r.html", methods=[])
    visit(page, file.as_uri() + "#view=layer&layer=conv2&size=64")
    page.wait_for_selector(".inspector .picture")
    box = page.locator(".grid canvas").first.bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + 30)
    page.wait_for_timeout(300)
    top, left, bottom, right = opened().layers["conv2"].effective_receptive_field([photograph(0)])
    assert f"90% of what moves it lies in {right - left}×{bottom - top} (dashed)" in page.inner_text(".cell")
