"""`opd watch` and `opd report`: the live page stays at home, follows a run that still writes, and ends well."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from opd.errors import RunError
from opd.report.live import make_server
from opd.report.page import page, updates
from tests.reports import browser, data_of, held_out_row, unpack, write_run  # noqa: F401


def test_half_written_and_broken_lines_are_tolerated(tmp_path):
    run = write_run(tmp_path / "live", finished=False)
    before = updates(run, {"metrics": 0, "samples": 0, "rollouts": 0})["offsets"]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "train/loss": \xff broken}\n{"step": 6, "train/loss": NaN}\n{"step": 7, "train/lo')
    (run / "samples.jsonl").open("ab").write('{"step": 5, "id": "p0", "tokens": ["é'.encode()[:-1])
    (one,) = data_of(page([run]))["runs"]
    assert one["series"]["train/loss"]["x"] == [1, 2, 3, 4, 6]
    assert one["series"]["train/loss"]["y"][-1] is None
    assert one["series"]["train/loss"]["not_finite"] == 1
    assert one["notes"] == ["1 line(s) of metrics.jsonl could not be read"]
    assert one["rows"]["held_out"]["total"] == 6
    assert not one["finished"]
    assert one["offsets"]["samples"] == before["samples"]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'ss": 0.5}\n')
    more = updates(run, one["offsets"])
    assert more["series"]["train/loss"] == {"x": [7], "y": [0.5], "not_finite": 0}
    assert more["rows"]["held_out"] == {"total": 0, "chunks": []}


def test_updates_go_on_in_pieces_and_notice_another_run(tmp_path):
    run = write_run(tmp_path / "live", steps=40)
    offsets, seen, rounds = {"metrics": 0, "samples": 0, "rollouts": 0}, [], 0
    while True:
        news = updates(run, offsets, limit=500)
        seen += news["series"].get("train/loss", {"x": []})["x"]
        offsets, rounds = news["offsets"], rounds + 1
        if not news["more"]:
            break
    assert seen == list(range(1, 41))
    assert rounds > 3
    assert not news["restarted"]
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    assert updates(run, offsets)["restarted"]


@pytest.fixture
def served(tmp_path):
    run = write_run(tmp_path / "live", finished=False)
    server = make_server(run)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield run, server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def get(port, path, host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"127.0.0.1:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_watch_serves_the_page_and_what_is_new(served):
    run, port = served
    status, text, headers = get(port, "/")
    assert status == 200
    assert headers["X-Frame-Options"] == "DENY"
    assert "connect-src 'self'" in text
    data = data_of(text)
    assert data["live"]
    offsets = data["runs"][0]["offsets"]
    query = "&".join(f"{key}={value}" for key, value in offsets.items())
    status, body, _ = get(port, f"/data.json?{query}")
    assert status == 200
    assert json.loads(body)["series"] == {}
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/loss": 0.25}\n')
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(held_out_row(5, 0)) + "\n")
    (run / "summary.json").write_text('{"seconds": 3}')
    news = json.loads(get(port, f"/data.json?{query}")[1])
    assert news["series"]["train/loss"] == {"x": [5], "y": [0.25], "not_finite": 0}
    assert unpack(news["rows"]["held_out"]["chunks"][0])[0]["tokens"] == held_out_row(5, 0)["tokens"]
    assert news["finished"]
    assert news["generation"] == data["runs"][0]["generation"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "192.168.0.1", "", "[::"]
)
def test_watch_refuses_other_host_names(served, host):
    _, port = served
    assert get(port, "/", host)[0] in (400, 403)
    assert get(port, "/data.json?metrics=0&samples=0&rollouts=0", host)[0] in (400, 403)


def test_watch_answers_to_the_names_of_loopback(served):
    _, port = served
    for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1", "[::1]:9"):
        assert get(port, "/data.json?metrics=0&samples=0&rollouts=0", host)[0] == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/metrics.jsonl", 404),
        ("/recipe.yaml", 404),
        ("/../live/recipe.yaml", 404),
        ("/%2e%2e/recipe.yaml", 404),
        ("//etc/passwd", 404),
        ("/student/model.safetensors", 404),
        ("/data.json", 400),
        ("/data.json?metrics=0&samples=0", 400),
        ("/data.json?metrics=0&samples=0&rollouts=-5", 400),
        ("/data.json?metrics=x&samples=0&rollouts=0", 400),
    ],
)
def test_watch_serves_nothing_else(served, path, status):
    _, port = served
    assert get(port, path)[0] == status


def test_watch_only_reads(served):
    _, port = served
    for method in ("POST", "PUT", "DELETE", "HEAD"):
        assert get(port, "/", method=method)[0] == 501


def test_watch_waits_for_a_run_that_has_logged_nothing_yet(tmp_path):
    data = data_of(page([tmp_path], live=True))
    assert data["runs"][0]["series"] == {}
    with pytest.raises(RunError, match=r"cannot listen on 127\.0\.0\.1:70000"):
        make_server(tmp_path, port=70000)


def opd(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "opd", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_the_commands(tmp_path):
    run = write_run(tmp_path / "run")
    report, watch, missing = opd("report", run), opd("watch", run, "--seconds", "0.5"), opd("watch", tmp_path / "no")
    out, err = report.communicate(timeout=60)
    assert (report.returncode, err) == (0, "")
    assert out.strip() == str(run / "report.html")
    assert data_of((run / "report.html").read_text(encoding="utf-8"))["runs"][0]["label"] == "run"
    out, err = watch.communicate(timeout=60)
    assert (watch.returncode, err) == (0, "")
    assert re.search(r"http://127\.0\.0\.1:\d+/", out)
    out, err = missing.communicate(timeout=60)
    assert missing.returncode == 2
    assert err.startswith(
        f"opd: run directory {tmp_path / 'no'} does not exist; give the directory that opd train wrote"
    )
    assert err.count("\n") == 1


def test_watch_ends_well_on_interrupt(tmp_path):
    process = opd("watch", write_run(tmp_path / "run"), "--no-open")
    line = process.stdout.readline()
    port = int(re.search(r":(\d+)/", line)[1])
    assert get(port, "/")[0] == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in err


@pytest.mark.slow
def test_in_a_browser_the_live_page_follows_the_run(browser, served):  # noqa: F811
    run, port = served
    browser.open(f"http://127.0.0.1:{port}/")
    assert "4 of 4 steps" in browser.run("document.querySelector('.states').innerText")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "held_out/reverse_kl": 0.125, "train/new": 3, "train/schedule/temperature": 1}\n')
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(held_out_row(9, 0)) + "\n")
    browser.until("document.querySelector('.states').innerText.includes('9 of 4 steps')")
    assert "0.125" in browser.run("document.getElementById('summary').innerText")
    browser.until("document.querySelector('.card .meta').innerText.includes('step 9')")
    curves = browser.run("document.getElementById('curves').innerText")
    assert "new" in curves
    assert "schedule of temperature" in curves
    (run / "summary.json").write_text('{"seconds": 3}')
    browser.until("document.querySelector('.live').textContent === 'finished'")
    (run / "recipe.yaml").write_text("name: another\n")
    os.utime(run / "recipe.yaml", (1, 1))
    browser.until("document.getElementById('recipe')?.innerText.includes('another')")
    assert browser.problems == []
