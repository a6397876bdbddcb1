"""The viewer without a browser: chunks and keys, what a session answers, the report's bytes, who the server lets in."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import innersight
from innersight import errors
from innersight.viewer import chunks
from innersight.viewer.keys import digest, key, parse
from innersight.viewer.report import assembled, report, written
from innersight.viewer.session import Session

settings.register_profile("viewer", deadline=None)
settings.load_profile("viewer")

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def opened(labels=("cat", "dog", "eel", "fox", "gnu")):
    torch.manual_seed(0)
    return innersight.open(Small().eval(), input_shape=(3, 32, 40), labels=list(labels))


def photograph(seed=0, size=(48, 36)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def session():
    return Session([opened()], [photograph(0), photograph(1)])


# -- chunks and keys


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.sampled_from(["f4", "u1", "i4"]), st.text(max_size=20))
def test_a_chunk_brings_back_what_was_packed(shape, kind, name):
    array = np.arange(np.prod(shape), dtype=kind).reshape(shape)
    arrays, about = chunks.unpack(chunks.pack({name: array, "more": np.ones(3, np.float64)}, text=name))
    assert arrays[name].tobytes() == array.tobytes()
    assert arrays[name].shape == array.shape
    assert arrays["more"].tolist() == [1, 1, 1]
    assert about == {"text": name}


def test_what_is_no_chunk_is_refused():
    with pytest.raises(errors.InputError, match="no chunk"):
        chunks.unpack(b"PNG!....")


def test_bytes_of_a_map_are_within_half_a_step_of_its_values():
    maps = np.random.default_rng(0).normal(0, [[[1]], [[100]], [[0]]], (3, 5, 7)).astype(np.float32)
    maps[0, 0, 0] = np.nan
    q = chunks.quantized(maps)
    step = (q["high"] - q["low"]) / 255
    back = q["low"][:, None, None] + step[:, None, None] * q["q"]
    known = np.isfinite(maps)
    assert (np.abs(back - maps) <= step[:, None, None] / 2 * 1.0001 + 1e-12)[known].all()
    assert q["low"][2] == q["high"][2] == 0
    assert not q["q"][2].any()


def test_block_means_are_means_of_blocks():
    maps = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    small = chunks.block_mean(maps, 3)
    assert small.shape == (2, 2, 3)
    assert np.allclose(small[:, 0, 0], maps[:, :3, :3].mean((1, 2)))
    assert np.allclose(small[:, 1, 2], maps[:, 3:, 6:].mean((1, 2)))


@given(st.text(min_size=1, max_size=10).filter(lambda t: t == t.encode("utf-8", "ignore").decode()), st.integers(0, 9))
def test_a_key_is_parsed_into_what_it_was_made_of(name, number):
    assert parse(key("maps", number, name)) == ("maps", [str(number), name])


@pytest.mark.parametrize("text", ["", "/", "maps//1", "x" * 3000])
def test_what_is_no_key_is_refused(text):
    with pytest.raises(errors.InputError, match="no key"):
        parse(text)


def test_digests_are_the_same_for_the_same_question():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


# -- what a session answers


def test_maps_are_those_of_the_network(session):
    net = session.networks[0]
    want = net.maps([photograph(1)], ["conv2"])["conv2"][0]
    arrays, about = chunks.unpack(session.get(key("maps", 0, 1, "conv2")))
    step = (arrays["high"] - arrays["low"]) / 255
    back = arrays["low"][:, None, None] + step[:, None, None] * arrays["q"]
    assert np.abs(back - want).max() <= step.max() / 2 + 1e-6
    assert about == {"of": 8, "size": [16, 20], "down": 1}
    stats, about = chunks.unpack(session.get(key("stats", 0, 1, "conv2")))
    assert np.allclose(stats["rms"], np.sqrt((want**2).mean((1, 2))), rtol=1e-5)
    assert np.allclose(stats["zeros"], (want == 0).mean((1, 2)))
    assert stats["place"].tolist() == want.reshape(8, -1).argmax(1).tolist()
    assert about["strongest"] == int((want**2).mean((1, 2)).argmax())


def test_a_vector_is_sent_as_maps_of_one_cell(session):
    arrays, _ = chunks.unpack(session.get(key("maps", 0, 0, "fc")))
    want = session.networks[0].predict([photograph(0)]).logits[0]
    assert np.allclose(arrays["low"], want, atol=1e-6)


def test_relevance_is_what_the_score_loses_to_first_order(session):
    """Behind conv2's rectifier everything is linear, so there it is what is lost exactly."""
    net = session.networks[0]
    layer = [n for n in net.layers if "relu" in n][-1]
    arrays, _ = chunks.unpack(session.get(key("relevance", 0, 0, layer, 2)))
    lost = -net.sensitivity([photograph(0)], layer, target=2).values[0]
    assert np.allclose(arrays["relevance"], lost, atol=1e-5)


def test_filters_are_the_weights(session):
    for name in ("conv1", "conv2"):
        arrays, _ = chunks.unpack(session.get(key("filters", 0, name)))
        assert np.array_equal(arrays["weight"], getattr(session.networks[0].module, name).weight.detach())
    with pytest.raises(errors.UnknownName, match="no weights"):
        session.get(key("filters", 0, "mean"))


def test_fields_are_the_layers_boxes(session):
    net = session.networks[0]
    for told in session.manifest()["networks"][0]["layers"]:
        if told["receptive_field"] is None:
            continue
        layer = net.layers[told["name"]]
        y, x = told["receptive_field"]["y"], told["receptive_field"]["x"]
        for row, column in [(0, 0), (layer.grid[1] - 1, 3), (5, layer.grid[2] - 1)]:
            box = (y[2 * row], x[2 * column], y[2 * row + 1], x[2 * column + 1])
            assert box == layer.receptive_field.box(row, column, clip=False)


def test_saliency_is_that_of_the_network_and_is_computed_once(session, monkeypatch):
    net = session.networks[0]
    entry = session.explain(0, 0, "gradient", "fox")
    want = net.explain([photograph(0)], "gradient", target="fox")
    arrays, _ = chunks.unpack(session.get(entry["key"]))
    step = float(arrays["high"][0] - arrays["low"][0]) / 255
    assert np.abs(arrays["low"][0] + step * arrays["q"][0] - want.values[0]).max() <= step / 2 + 1e-9
    assert entry["text"] == "fox"
    assert entry["verdict"]["score"] == pytest.approx(want.verdict["score"][0])
    monkeypatch.setattr(net, "explain", None)
    assert session.explain(0, 0, "gradient", "fox") is entry


def test_why_this_and_not_that(session):
    entry = session.explain(0, 0, "gradient_x_input", "fox", "eel")
    assert entry["text"] == "fox and not eel"
    want = (
        session.networks[0]
        .explain([photograph(0)], "gradient_x_input", target=innersight.targets.difference("fox", "eel"))
        .values[0]
    )
    arrays, _ = chunks.unpack(session.get(entry["key"]))
    assert arrays["low"][0] == pytest.approx(want.min(), abs=1e-7)
    assert arrays["high"][0] == pytest.approx(want.max(), abs=1e-7)


def test_hiding_a_region_asks_the_network_again(session):
    net = session.networks[0]
    x = net.read([photograph(0)]).tensor.clone()
    x[..., 4:20, 8:30] = x.mean((2, 3), keepdim=True)
    want = net.predict(x).logits[0]
    found = session.hidden(0, 0, [4, 8, 20, 30])
    assert [k for k, *_ in found] == np.argsort(-want).tolist()
    assert [s for *_, s in found] == pytest.approx(sorted(want, reverse=True), abs=1e-5)
    with pytest.raises(errors.InputError, match="must lie in the input of 32x40"):
        session.hidden(0, 0, [4, 8, 40, 30])


def test_pictures_are_added_behind_those_there_are(session):
    assert session.add([photograph(2)]) == range(2, 3)
    assert [p["id"] for p in session.manifest()["inputs"]] == [0, 1, 2]
    want = session.networks[0].predict([photograph(2)]).top(5)[0]
    assert [label for _, label, *_ in session.manifest()["inputs"][2]["predictions"][0]["top"]] == [n for n, _ in want]


@pytest.mark.parametrize(
    "asked", ["maps/0/0/none", "maps/0/9/conv1", "maps/7/0/conv1", "maps/0/0", "maps/a/b/c", "secret/0", "picture/-1",
              "relevance/0/0/conv1/99", "saliency/0000"],
)  # fmt: skip
def test_what_does_not_exist_is_said(session, asked):
    with pytest.raises(errors.InnersightError):
        session.get(asked)


def test_a_session_lets_go_of_what_it_can_make_again(session, monkeypatch):
    entry = session.explain(0, 0, "gradient")
    monkeypatch.setattr("innersight.viewer.session.KEPT", 3000)
    first = session.get(key("maps", 0, 0, "conv1"))
    session.get(key("maps", 0, 0, "conv2"))
    assert key("maps", 0, 0, "conv1") not in session._chunks
    assert entry["key"] in session._chunks
    assert session.get(key("maps", 0, 0, "conv1")) == first


def test_the_network_is_left_as_it_was(session):
    from innersight.testing import left_as_found

    with left_as_found(session.networks[0].module):
        session.get(key("relevance", 0, 0, "conv1", 1))
        session.explain(0, 1, "smoothgrad")
        session.hidden(0, 0, [0, 0, 5, 5])


# -- the report


def blocks(content: bytes) -> dict[str, bytes]:
    found = re.findall(r'<script type="text/plain" class="chunk" data-key="([^"]*)">([^<]*)</script>', content.decode())
    return {k: base64.b64decode(v) for k, v in found}


def told(content: bytes) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="manifest">(.*?)</script>', content.decode(), re.S)
    return json.loads(text)


def test_a_report_holds_what_the_session_answers(tmp_path):
    file = report(opened(), [photograph(0)], tmp_path / "r.html", methods=["gradient", "gradcam"])
    held, session = blocks(file.read_bytes()), Session([opened()], [photograph(0)])
    for name in ("maps/0/0/conv1", "stats/0/0/fc", "picture/0", "filters/0/conv1"):
        assert held[name] == session.get(name)
    target = session._targets[0][0]
    assert held[f"relevance/0/0/conv2/{target}"] == session.get(f"relevance/0/0/conv2/{target}")
    assert [e["method"] for e in told(file.read_bytes())["saliency"]] == ["gradient", "gradcam"]


def test_the_same_report_twice_is_the_same_bytes(tmp_path):
    made = [
        report(opened(), [photograph(0)], tmp_path / f"{i}.html", methods=["smoothgrad"]).read_bytes() for i in "ab"
    ]
    assert made[0] == made[1]


def test_a_report_keeps_to_its_size_and_says_what_it_left_out():
    whole = written(Session([opened()], [photograph(0), photograph(1)]), [], 10**8, lambda *_: None)
    assert told(whole)["reduced"] == []
    smallest = len(assembled(told(whole), {k: v for k, v in blocks(whole).items() if not k.startswith("maps")}))
    for limit in np.linspace(smallest + 3000, len(whole), 6).astype(int):
        small = written(Session([opened()], [photograph(0), photograph(1)]), [], int(limit), lambda *_: None)
        assert len(small) <= limit
        left = {r["key"] for r in told(small)["reduced"]}
        assert {k for k in blocks(whole) if k.startswith("maps") and blocks(small).get(k) != blocks(whole)[k]} == left
        assert {k for k in blocks(small) if k.startswith(("stats", "picture"))} == {
            k for k in blocks(whole) if k.startswith(("stats", "picture"))
        }
    with pytest.raises(errors.InputError, match="even without maps"):
        written(Session([opened()], [photograph(0)]), [], 10_000, lambda *_: None)


def test_a_method_that_cannot_be_computed_is_said(tmp_path):
    file = report(opened(), [photograph(0)], tmp_path / "r.html", methods=["gradient", "attention_rollout"])
    (refused,) = told(file.read_bytes())["refused"]
    assert refused["method"] == "attention_rollout"
    assert "attention" in refused["why"]
    with pytest.raises(errors.UnknownName, match="no method"):
        report(opened(), [photograph(0)], tmp_path / "s.html", methods=["nonsense"])
    assert not (tmp_path / "s.html").exists()


def test_names_are_text_wherever_they_stand(tmp_path):
    net = opened([HOSTILE, "b", "c", "d", "e"])
    folder = tmp_path / "pictures"
    folder.mkdir()
    photograph(0).save(folder / "<img src=x onerror=alert(1)>.png".replace("/", ""))
    file = report(net, [folder], tmp_path / "r.html", methods=["gradient"], title=HOSTILE)
    text = file.read_text()
    assert "<img src=x" not in text
    assert "</script><img" not in text
    assert told(file.read_bytes())["title"] == HOSTILE
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1)
    assert "default-src &#x27;none&#x27;" in policy
    assert "connect-src &#x27;none&#x27;" in policy


def test_a_report_shows_pictures_and_predictions_without_javascript(tmp_path):
    text = report(opened(), [photograph(0)], tmp_path / "r.html", methods=["gradcam"]).read_text()
    (plain,) = re.findall(r"<noscript>(.*?)</noscript>", text, re.S)
    assert "data:image/png;base64," in plain
    assert all(name in plain for name in ("cat", "dog", "eel", "fox", "gnu"))
    assert plain.count("<img") == 2
    assert "gradcam for" in plain


def test_two_networks_stand_in_one_report(tmp_path):
    torch.manual_seed(1)
    other = innersight.open(Small().eval(), input_shape=(3, 24, 24))
    file = report([opened(), other], [photograph(0)], tmp_path / "r.html", methods=["gradient"])
    manifest = told(file.read_bytes())
    assert [n["input"] for n in manifest["networks"]] == [[3, 32, 40], [3, 24, 24]]
    assert {"maps/0/0/conv1", "maps/1/0/conv1"} <= set(blocks(file.read_bytes()))


# -- the server


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("uvicorn")
    from innersight.viewer.server import Server

    with Server(Session([opened()], [photograph(0)])) as running:
        yield running


def ask(server, path="/", method="GET", body=None, cookie=True, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    if cookie:
        headers["Cookie"] = f"innersight_{server.port}={server.token}"
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def test_the_token_becomes_a_cookie_that_other_sites_cannot_send(server):
    answer, _ = ask(server, f"/?token={server.token}", cookie=False)
    assert answer.status == 303
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    answer, body = ask(server, Cookie=cookie.partition(";")[0], cookie=False)
    assert answer.status == 200
    assert b"importmap" in body
    assert server.token.encode() not in body


@pytest.mark.parametrize("path", ["/", "/api/manifest", "/page/app.js", "/?token=wrong", "/api/get/picture/0"])
def test_without_the_token_there_is_nothing(server, path):
    answer, body = ask(server, path, cookie=False)
    assert answer.status == 401
    assert b"token" in body


def test_other_names_for_this_machine_are_refused(server):
    """DNS rebinding: a page of a stranger whose name now leads here."""
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", "127.0.0.1:1"):
        assert ask(server, Host=host)[0].status == 421
    assert ask(server, Host=f"localhost:{server.port}")[0].status == 200


def test_requests_of_other_pages_are_refused(server):
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{server.port}", "http://127.0.0.1:1"):
        answer, _ = ask(server, "/api/hide", "POST", b"{}", Origin=origin)
        assert answer.status == 403
    assert ask(server, Sec_Fetch_Site="cross-site")[0].status == 403
    box = json.dumps({"kind": "explain", "network": 0, "input": 0, "box": [0, 0, 8, 8]})
    answer, body = ask(server, "/api/hide", "POST", box, Origin=f"http://127.0.0.1:{server.port}")
    assert answer.status == 200
    assert len(json.loads(body)["top"]) == 5


@pytest.mark.parametrize(
    "path", ["/page/..%2f..%2fsession.py", "/page/../server.py", "/page/%2e%2e/session.py", "/etc/passwd",
             "/api/get/../../etc/passwd", "/api/get/picture%2f..%2f..", "/api/get//etc/passwd", "/page/app.py"],
)  # fmt: skip
def test_nothing_that_is_sent_is_a_path(server, path):
    answer, body = ask(server, path)
    assert answer.status in (404, 422)
    assert b"root:" not in body
    assert b"import" not in body


def test_every_answer_carries_the_headers(server):
    for path in ("/", "/page/app.js", "/api/manifest", "/nothing"):
        answer, _ = ask(server, path)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Frame-Options"] == "DENY"
    policy = ask(server)[0].headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe-eval" not in policy


def test_chunks_are_those_of_the_session(server):
    answer, body = ask(server, "/api/get/maps/0/0/conv1")
    assert answer.status == 200
    assert body == server_session(server).get("maps/0/0/conv1")
    answer, body = ask(server, "/api/get/maps/0/0/nothing")
    assert answer.status == 404
    assert "no layer 'nothing'" in json.loads(body)["error"]


def server_session(server):
    return server.server.config.app.app.routes[3].endpoint.__self__.answers.session


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_uploads_are_pictures_within_limits(server):
    answer, body = ask(server, "/api/inputs", "POST", png(photograph(3)), X_Name="%3Cb%3E.png")
    assert answer.status == 201
    said = json.loads(body)
    assert said["name"] == "<b>.png"
    assert len(said["predictions"][0]["top"]) == 5
    bomb = png(Image.new("1", (20000, 20000)))
    for content in (b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n", bomb):
        answer, body = ask(server, "/api/inputs", "POST", content)
        assert answer.status == 422
        assert "\n" not in json.loads(body)["error"]
    answer, _ = ask(server, "/api/inputs", "POST", b"x", Content_Length=str(64 << 20))
    assert answer.status == 413


def events(server, number):
    _, body = ask(server, f"/api/jobs/{number}/events")
    return [(k, json.loads(d)) for k, d in re.findall(r"event: (\w+)\ndata: (.*)\n", body.decode())]


def test_a_job_tells_its_progress_and_its_end(server):
    answer, body = ask(
        server, "/api/jobs", "POST", json.dumps({"kind": "explain", "network": 0, "input": 0, "method": "smoothgrad"})
    )
    assert answer.status == 202
    told = events(server, json.loads(body)["id"])
    assert told[0][0] == "progress"
    kind, entry = told[-1]
    assert kind == "done"
    assert ask(server, f"/api/get/{entry['key']}")[1] == server_session(server).get(entry["key"])


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [({"kind": "explain", "network": 0, "input": 0, "method": "nonsense"}, "no method"),
     ({"kind": "explain", "network": 0, "input": 0, "method": "gradient", "target": "yak"}, "no class"),
     ({"kind": "explain", "network": 0, "input": 0, "method": "attention_rollout"}, "attention")],
)  # fmt: skip
def test_a_job_that_fails_says_why(server, asked, sentence):
    _, body = ask(server, "/api/jobs", "POST", json.dumps(asked))
    kind, said = events(server, json.loads(body)["id"])[-1]
    assert kind == "failed"
    assert sentence in said["error"]


NONSENSE = [
    b"", b"[]", b"{", b'{"network": 0}', b"[" * 100000, b'{"kind":"explain","network":9,"input":0,"method":"gradient"}',
    b'{"kind":"explain","network":"x","input":0,"method":"gradient"}', b'{"kind":"explain","network":0,"input":7}',
    b'{"kind":"maximize","network":0,"layer":"conv1","channel":"x"}',
]  # fmt: skip


@pytest.mark.parametrize("body", NONSENSE)
def test_nonsense_gets_a_sentence(server, body):
    answer, said = ask(server, "/api/jobs", "POST", body)
    assert answer.status == 422
    assert json.loads(said)["error"]


def test_what_maximizes_a_channel_is_found_on_the_server(server):
    asked = {"kind": "maximize", "network": 0, "layer": "conv2", "channel": 3}
    _, body = ask(server, "/api/jobs", "POST", json.dumps(asked))
    kind, made = events(server, json.loads(body)["id"])[-1]
    assert kind == "done"
    want = opened().maximize("conv2", 3)
    assert made["verdict"]["rise"] == pytest.approx(want.verdict["rise"][0], rel=1e-4)
    _, content = ask(server, f"/api/get/{made['key']}")
    assert np.abs(np.asarray(Image.open(io.BytesIO(content))).astype(int) - np.asarray(want.images[0])).max() <= 1


def test_leaving_cancels_a_job():
    pytest.importorskip("uvicorn")
    from innersight.viewer.server import Server

    with Server(Session([opened()], [photograph(0)])) as server:
        time.sleep(0.3)
        viewer = server.server.config.app.app.routes[3].endpoint.__self__.answers
        begun, let = threading.Event(), threading.Event()
        net = viewer.session.networks[0]

        def endless(*_, **__):
            begun.set()
            while True:
                net.progress(0, 1, "points")
                let.wait(0.01)

        net.explain = endless
        _, body = ask(
            server, "/api/jobs", "POST", json.dumps({"kind": "explain", "network": 0, "input": 0, "method": "gradient"})
        )
        number = json.loads(body)["id"]
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request(
            "GET", f"/api/jobs/{number}/events", headers={"Cookie": f"innersight_{server.port}={server.token}"}
        )
        connection.getresponse().read(10)
        assert begun.wait(10)
        job = viewer.jobs[number]
        connection.close()
        for _ in range(200):
            if job.over:
                break
            time.sleep(0.05)
        assert job.events[-1] == ("failed", {"error": "cancelled"})


def test_maps_do_not_wait_for_a_long_job_and_leave_it_as_it_was():
    pytest.importorskip("uvicorn")
    from innersight.viewer.server import Server

    with Server(Session([opened()], [photograph(0)])) as server:
        session = server_session(server)
        net = session.networks[0]
        begun, enough = threading.Event(), threading.Event()
        real, told_ = type(net).explain, []

        def long(*args, **options):
            begun.set()
            while True:  # real passes, again and again until the maps have come
                made = real(net, *args, **options)
                if enough.is_set():
                    return made

        net.explain = long
        question = {"kind": "explain", "network": 0, "input": 0, "method": "smoothgrad"}
        number = json.loads(ask(server, "/api/jobs", "POST", json.dumps(question))[1])["id"]
        listener = threading.Thread(target=lambda: told_.append(events(server, number)))
        listener.start()
        assert begun.wait(10)
        answer, body = ask(server, "/api/get/" + key("maps", 0, 0, "conv2"))
        assert answer.status == 200
        assert not enough.is_set()
        enough.set()
        listener.join(20)
        fresh = Session([opened()], [photograph(0)])
        assert body == fresh.get(key("maps", 0, 0, "conv2"))
        kind, entry = told_[0][-1]
        assert kind == "done"
        assert session.get(entry["key"]) == fresh.get(fresh.explain(0, 0, "smoothgrad")["key"])


def test_the_commands_write_a_page_and_refuse_in_a_sentence(tmp_path):
    from click.testing import CliRunner

    from innersight.cli import main

    photograph(0).save(tmp_path / "a.png")
    torch.save(Small().state_dict(), tmp_path / "m.pth")
    given = [
        "report",
        str(tmp_path / "m.pth"),
        "--arch",
        "test_viewer:Small",
        str(tmp_path / "a.png"),
        "--input-shape",
        "3,32,40",
    ]
    out = tmp_path / "r.html"
    run = CliRunner().invoke(main, [*given, "--method", "gradient", "--out", str(out), "--json"])
    assert run.exit_code == 0, run.output
    assert out.stat().st_size == json.loads(run.stdout)["bytes"]
    run = CliRunner().invoke(main, [*given[:5], "--out", "x.png"])
    assert run.exit_code == 2
    assert "a report is a .html file" in run.output


def test_two_networks_are_compared_on_what_was_given():
    """Floats are compared as they are, not as the 8-bit pictures that they look like."""
    x = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0)) * 5
    pairs = Session([opened(), opened()], x).comparison()
    assert pairs
    assert all(p["equal"] for p in pairs)
    other = opened()
    with torch.no_grad():
        other.module.conv1.weight *= 1.5
    want = innersight.compare(opened(), other, x, method=None)
    found = {p["a"]: p["sqnr"] for p in Session([opened(), other], x).comparison()}
    assert found["conv1"] == pytest.approx(want.layers["conv1"].sqnr)
