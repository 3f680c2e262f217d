"""The server probe set: what strangers, other sites, hostile texts and slow clients must not achieve."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from conftest import HOSTILE, HOSTILE_TITLE
from koret.web import connection, protection
from koret.web.app import PASSAGES, QUERY_CHARACTERS, STATIC, make_app
from koret.web.server import Server, bind

SEARCH = {"query": "가마 나바", "columns": ["m0", "bm25"]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address, timeout=30) as one:
        yield one


@pytest.fixture
def impatient(app, monkeypatch):
    """The same page on a server that waits for a client half a second."""
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.5)
    monkeypatch.setattr(protection, "BODY_SECONDS", 0.5)
    with bind("127.0.0.1", 0) as own, Server(app).serve_in_background(own) as where:
        yield where


def connect(address: str, small: bool = False) -> socket.socket:
    own = socket.socket()
    if small:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    own.settimeout(10)
    own.connect((urlsplit(address).hostname, urlsplit(address).port))
    return own


def exchange(address: str, data: bytes) -> bytes:
    """Send raw bytes and read until the server closes or falls silent."""
    with connect(address) as own:
        own.settimeout(3)
        own.sendall(data)
        received = b""
        try:
            while piece := own.recv(65536):
                received += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return received


def assert_answers(address: str, within: float = 3.0) -> None:
    began = time.perf_counter()
    answer = httpx.post(f"{address}/api/search", json=SEARCH, timeout=30)
    assert answer.status_code == 200 and time.perf_counter() - began < within


def assert_in_words(answer: httpx.Response) -> None:
    """A refusal is a sentence in both languages, without paths, code or traces."""
    error = answer.json()["error"]
    assert re.search("[가-힣]", error["ko"]) and re.search("[A-Za-z]", error["en"])
    assert not re.search(r"Traceback|\.py|/(?:home|root|work|tmp|usr)\b", answer.text)


# ---- whose requests are answered


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io",
    "192.0.2.7", "0.0.0.0", "", "localhost@evil.example", "localhost/evil", "[::2]",
])  # fmt: skip
def test_a_foreign_host_is_refused(client, host):
    for path in ("/", "/app.js", "/api/state"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 421, host
        assert_in_words(answer)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:8000", "localhost."])
def test_loopback_names_are_answered(client, host):
    assert client.get("/api/state", headers={"Host": host}).status_code == 200


def test_two_hosts_or_none_are_refused(address):
    assert b" 421 " in exchange(address, b"GET / HTTP/1.0\r\n\r\n").split(b"\r\n")[0]
    two = exchange(address, b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n").split(b"\r\n")[0]
    assert b" 421 " in two or b" 400 " in two


def test_a_server_open_to_the_network_answers_to_addresses_and_allowed_names_only(opened):
    app = make_app(opened, hosts=("0.0.0.0", "search.example"), open_to_network=True)
    with bind("127.0.0.1", 0) as own, Server(app).serve_in_background(own) as where:
        for host, status in (
            ("192.0.2.7:8000", 200),
            ("[2001:db8::1]", 200),
            ("search.example", 200),
            ("evil.example", 421),
        ):
            assert httpx.get(f"{where}/api/state", headers={"Host": host}).status_code == status, host


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"}, {"Origin": "file://"},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
])  # fmt: skip
def test_requests_of_other_sites_are_refused(client, headers):
    answer = client.post("/api/search", json=SEARCH, headers=headers)
    assert answer.status_code == 403
    assert_in_words(answer)
    assert "access-control-allow-origin" not in answer.headers


def test_the_page_itself_may_ask(client, address):
    own = {"Origin": address, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/api/search", json=SEARCH, headers=own).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_a_foreign_form_can_send_is_no_request(client, kind):
    answer = client.post("/api/search", content=json.dumps(SEARCH), headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert_in_words(answer)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "X" * 40])
def test_other_methods_are_refused(client, method):
    assert client.request(method, "/api/search").status_code in (400, 405)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/search"), ("POST", "/api/state"), ("POST", "/"), ("POST", "/app.js")]
)
def test_methods_are_not_confused(client, method, path):
    answer = client.request(method, path, **({"json": {}} if method == "POST" else {}))
    assert answer.status_code in (404, 405)
    assert_in_words(answer)


def test_every_answer_carries_its_protection(client):
    for answer in (client.get("/"), client.get("/app.js"), client.get("/api/state"), client.get("/nowhere"),
                   client.get("/", headers={"Host": "evil.example"})):  # fmt: skip
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "server" not in answer.headers


# ---- nothing but the page is served


@pytest.mark.parametrize("path", ["/../app.py", "/..%2fapp.py", "/%2e%2e/app.py", "/..%5capp.py", "//etc/passwd",
                                  "/static/../../app.py", "/%2fetc%2fpasswd", "/app.js%00.html", "/....//app.py",
                                  "/docs", "/openapi.json", "/redoc", "/api/", "/api/../app.py", "/~root"])  # fmt: skip
def test_nothing_outside_the_static_files_is_served(address, path):
    raw = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    received = exchange(address, raw)
    assert re.match(rb"HTTP/1.1 (404|400|405) ", received), received[:200]
    assert b"import" not in received and b"root:" not in received


def test_the_page_fetches_nothing_from_elsewhere():
    for file in STATIC.iterdir():
        for found in re.findall(r"""(?:https?:)?//[\w.-]+\.[a-z]{2,}[^\s"')]*""", file.read_text(encoding="utf-8")):
            assert found.startswith("http://www.w3.org/"), f"{file.name} names {found}"  # names of formats, not fetched


def test_the_static_files_hold_no_inline_script_and_never_write_markup(client):
    class Inline(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag, attributes):
            names = dict(attributes)
            self.found += [name for name in names if name.startswith("on") or name == "style"]
            self.found += [tag] if tag == "style" or (tag == "script" and "src" not in names) else []

    parser = Inline()
    parser.feed(client.get("/").text)
    assert parser.found == []
    for file in STATIC.glob("*.js"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            file
        )


def test_hostile_texts_come_as_json_and_as_they_are(client):
    """They are data here; that the page shows them as text is test_web_browser's."""
    answer = client.post("/api/search", json={"query": HOSTILE[0], "columns": ["m0", "m1", "bm25", "hybrid"], "k": 20})
    assert answer.headers["content-type"] == "application/json"
    found = [one for one in answer.json()["passages"].values() if HOSTILE[0] in one["text"]]
    assert found and all(text in found[0]["text"] for text in HOSTILE)
    assert found[0]["heading"].startswith(HOSTILE_TITLE) or found[0]["heading"] == ""


# ---- what is asked


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"query": 1}', b'{"query":"a","columns":["m0"],"more":1}',
    b'{"query":"\\ud800","columns":["m0"]}', b'{"query":"a","columns":"m0"}', b'{"query":"a","columns":["m0"],"k":"x"}',
    b'{"query":"a","columns":["m0"],"k":1e999}', b"[" * 100_000, b'{"query":' * 20_000, b'{"query":NaN,"columns":[]}',
    b'{"query":"   ","columns":["m0"]}', b'{"query":"a","columns":["nope"]}', b'{"query":"a","columns":[]}',
])  # fmt: skip
def test_nonsense_is_refused_in_words(client, body):
    for path in ("/api/search", "/api/rank"):
        answer = client.post(path, content=body, headers=JSON)
        assert answer.status_code == 400, body[:40]
        assert_in_words(answer)


def test_long_questions_are_refused_and_the_longest_is_answered(client):
    long = client.post("/api/search", json={**SEARCH, "query": "가" * (QUERY_CHARACTERS + 1)})
    assert long.status_code == 400 and "2,000" in long.json()["error"]["en"]
    assert client.post("/api/search", json={**SEARCH, "query": "가" * QUERY_CHARACTERS}).status_code == 200


@pytest.mark.parametrize("k", [-5, 0, 10**9])
def test_the_number_of_results_has_its_bounds(client, k):
    answer = client.post("/api/search", json={**SEARCH, "k": k})
    assert answer.status_code == 200 and 1 <= len(answer.json()["columns"][0]["hits"]) <= 50


def test_pasted_passages_are_capped_in_number_and_length(client):
    body = {"query": "가마", "columns": ["m0"]}
    for passages, word in (
        (["가"] * (PASSAGES + 1), "100"),
        (["가" * 2001], "2,000"),
        ([], "one passage"),
        ([" "], "one"),
    ):
        answer = client.post("/api/rank", json={**body, "passages": passages})
        assert answer.status_code == 400 and word in answer.json()["error"]["en"]


@pytest.mark.parametrize("query", ["kind=nope", "start=x", "count=-1", "start=-5&count=1000000", "text=" + "가" * 3000])
def test_report_questions_bear_any_parameters(client, query):
    answer = client.get(f"/api/report/questions?{query}")
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert_in_words(answer)
    else:
        assert len(answer.json()["questions"]) <= 100


def test_a_body_over_the_cap_is_refused_with_and_without_its_length(client):
    big = b'{"query":"' + b"a" * (300 << 10) + b'"}'
    declared = client.post("/api/search", content=big, headers=JSON)
    assert declared.status_code == 413 and "256" in declared.json()["error"]["en"]
    pieces = (big[i : i + 10_000] for i in range(0, len(big), 10_000))
    assert client.post("/api/search", content=pieces, headers=JSON).status_code == 413  # chunked


def test_an_endless_chunked_body_is_cut_off(address):
    with connect(address) as own:
        own.sendall(b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        with pytest.raises(OSError):
            for _ in range(5000):  # 320 MB, if anybody took it
                own.sendall(chunk)
    assert_answers(address)


@pytest.mark.parametrize("raw", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), b"\x00" * 4096, b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", b"\r\n" * 1000,
    b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n123456",
    b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
    b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X%d: 1\r\n" % i for i in range(20_000)) + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
])  # fmt: skip
def test_garbage_and_huge_headers_harm_nobody(address, raw):
    try:
        received = exchange(address, raw)
    except (BrokenPipeError, ConnectionResetError):
        received = b""
    assert b"Traceback" not in received and b".py" not in received
    assert_answers(address)


def test_a_failure_inside_says_nothing_of_the_inside(client, opened, monkeypatch):
    async def fail(*args):
        raise RuntimeError("secret /home/someone/key")

    monkeypatch.setattr(opened.desk, "search", fail)
    answer = client.post("/api/search", json=SEARCH)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert_in_words(answer)


# ---- slow clients


def wait_until_closed(own: socket.socket, seconds: float) -> bool:
    own.settimeout(seconds)
    try:
        while own.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_headers_dribbled_are_dropped_and_delay_nobody(impatient):
    slow = [connect(impatient) for _ in range(40)]
    for own in slow:
        own.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    stop = threading.Event()

    def dribble():
        while not stop.wait(0.1):
            for own in slow:
                try:
                    own.send(b"a")
                except OSError:
                    pass

    thread = threading.Thread(target=dribble)
    thread.start()
    assert_answers(impatient)
    closed = [wait_until_closed(own, 5) for own in slow]
    stop.set()
    thread.join()
    assert all(closed)


def test_a_silent_connection_is_dropped(impatient):
    with connect(impatient) as own:
        assert wait_until_closed(own, 5)


def test_a_body_dribbled_is_answered_with_408_and_delays_nobody(impatient):
    with connect(impatient) as own:
        own.sendall(b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 100\r\n\r\n{")  # fmt: skip
        assert_answers(impatient)
        own.settimeout(5)
        assert own.recv(65536).startswith(b"HTTP/1.1 408 ")
        assert wait_until_closed(own, 5)


def test_a_reader_that_never_reads_is_dropped_and_delays_nobody(impatient):
    with connect(impatient, small=True) as own:
        own.setblocking(False)
        asked = b"GET /style.css HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50
        deadline, dropped = time.monotonic() + 20, False
        while not dropped and time.monotonic() < deadline:
            try:
                own.send(asked)
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                dropped = True
        assert dropped
    assert_answers(impatient)


def test_beyond_the_most_connections_the_longest_waiting_one_goes(app, monkeypatch):
    monkeypatch.setattr(connection, "CONNECTIONS", 8)
    with bind("127.0.0.1", 0) as own, Server(app).serve_in_background(own) as where:
        idle = []
        for _ in range(12):
            idle.append(connect(where))
            time.sleep(0.02)
        assert_answers(where)
        assert wait_until_closed(idle[0], 2) and not wait_until_closed(idle[-1], 0.2)
        for one in idle:
            one.close()


# ---- the command


def start_web(log_dir: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "koret.cli", "web", "--log-dir", str(log_dir), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def test_a_taken_port_is_one_sentence(log_dir):
    with bind("127.0.0.1", 0) as own:
        own.listen()
        port = own.getsockname()[1]
        done = start_web(log_dir, "--port", str(port))
        out, err = done.communicate(timeout=120)
    assert done.returncode == 1
    assert (
        err.strip() == f"koret: cannot listen on 127.0.0.1:{port} (Address already in use); choose another with --port"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_where_it_listens_and_ends_on_a_signal(log_dir, opened, number):
    public = ["--host", "0.0.0.0", "--precision", "bf16"]
    process = start_web(log_dir, "--port", "0", *(public if number == signal.SIGTERM else []))
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Stop with Ctrl-C" in line:
            break
    said = "".join(lines)
    port = re.search(r"http://localhost:(\d+)", said)[1]
    assert ("There is no password" in said) == (number == signal.SIGTERM)
    if number == signal.SIGTERM:
        assert "leave out --host" in said and "ssh -L" in said
    assert ("questions in bf16" in said) == (number == signal.SIGTERM)
    assert httpx.get(f"http://localhost:{port}/api/state").status_code == 200  # whoever reads the address may come
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out.strip() == "stopped" and err == ""
