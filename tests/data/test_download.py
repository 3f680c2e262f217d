"""koret download against a real local server that misbehaves on command."""

from __future__ import annotations

import email.utils
import hashlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from koret.data.download import LICENCE, download
from koret.data.published import PUBLISHED, ROOTS, Damaged, list_files, verify_file
from koret.data.transfer import DownloadError
from koret.files import DiskFull
from koret.runs import RunBusy, lock_run

TRAIN, DEV = "KorQuAD_v1.0_train.json", "KorQuAD_v1.0_dev.json"


def make_json(seed: int, size: int = 300_000) -> bytes:
    noise = random.Random(seed).randbytes(size // 2).hex()
    return json.dumps({"version": "KorQuAD_v1.0", "data": [{"title": "예고범", "noise": noise}]}).encode()


def make_zip(seed: int, size: int = 40_000) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"korquad2.1_{seed:02d}.json", make_json(seed, size))
    return buffer.getvalue()


class Site:
    """Files by path, one list of faults per path (each serves one request), and a record of what was asked and sent."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.faults, self.asked = files, {}, []
        self.ranges, self.weak, self.etags, self.obeys_if_range = True, False, True, True
        self.released = threading.Event()

    def etag(self, body: bytes) -> str:
        return ("W/" if self.weak else "") + f'"{hashlib.md5(body).hexdigest()}"'

    def requests(self, name: str) -> list[dict]:
        return [entry for entry in self.asked if entry["name"] == name]


class Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        site, path = self.site, self.path.split("/dataset/")[-1]
        entry = {"name": path.split("/")[-1], "url": self.path, "range": self.headers["Range"], "sent": 0}
        entry["if_range"] = self.headers["If-Range"]
        site.asked.append(entry)
        faults = site.faults.get(path.split("/")[-1], [])
        fault = faults.pop(0) if faults else {}
        if "before" in fault:
            fault["before"]()
        if "redirect" in fault:
            return self.answer(entry, 302, b"", {"Location": fault["redirect"]})
        if "status" in fault:
            return self.answer(entry, fault["status"], b"no", fault.get("headers", {}))
        if "body" in fault:
            return self.answer(entry, 200, fault["body"], {"Content-Type": "text/html"})
        if path not in site.files:
            return self.answer(entry, 404, b"no", {})
        body = site.files[path]
        headers = {"ETag": site.etag(body)} if site.etags else {"Last-Modified": email.utils.formatdate(0, usegmt=True)}
        start, status = 0, 200
        whole = site.obeys_if_range and self.headers["If-Range"] not in (None, site.etag(body))
        if self.headers["Range"] and site.ranges and not whole:
            start, status = int(self.headers["Range"][6:-1]), 206
            if start >= len(body):
                return self.answer(entry, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        headers["Content-Length"] = len(body) - start + fault.get("extra", 0)
        if fault.get("unsized"):
            del headers["Content-Length"]
        self.answer(entry, status, body[start:][: fault.get("cut", len(body))], headers)
        if "hang" in fault:
            self.wfile.flush()
            site.released.wait(10)

    def answer(self, entry: dict, status: int, body: bytes, headers: dict):
        entry["status"] = status
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            if not (name == "Content-Length" and "ETag" in headers and "Content-Length" not in headers):
                self.send_header(name, str(value))
        self.end_headers()
        try:
            self.wfile.write(body)
            entry["sent"] = len(body)
        except OSError:  # the client stopped reading
            pass


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def site():
    site = Site({TRAIN: make_json(1), DEV: make_json(2, 60_000)})
    site.files |= {path: make_zip(i) for i, path in enumerate(list_files("korquad-2.1"))}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"site": site}))
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_port}/dataset/"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield site
    site.released.set()
    server.shutdown()
    server.server_close()


def fetch(site: Site, dest: Path, dataset: str = "korquad-1.0", lines: list | None = None, **options):
    announce = (lambda line: None) if lines is None else lines.append
    options = {"base_url": site.url, "backoff": 0.001, "timeout": 5.0, "announce": announce, **options}
    return download(dataset, dest, **options)


def assert_whole(site: Site, dest: Path, dataset: str = "korquad-1.0"):
    for path in list_files(dataset):
        assert (dest / path).read_bytes() == site.files[path]
    assert not [path for path in dest.rglob("*") if ".part" in path.name]


# ---------------------------------------------------------------- the ordinary way


def test_all_zips_arrive_in_the_official_layout_two_at_a_time(site, tmp_path):
    meeting = threading.Barrier(2)  # breaks, and the download with it, unless two requests are under way at once
    for name in ("KorQuAD_2.1_train_00.zip", "KorQuAD_2.1_train_01.zip"):
        site.faults[name] = [{"before": lambda: meeting.wait(5)}]
    report = fetch(site, tmp_path, "korquad-2.1", jobs=2)
    assert not meeting.broken
    assert_whole(site, tmp_path, "korquad-2.1")
    assert report.files[0].path == tmp_path / "KorQuAD_2.1/train/KorQuAD_2.1_train_00.zip"
    assert report.files[-1].path == tmp_path / "KorQuAD_2.1/dev/KorQuAD_2.1_dev_01.zip"
    assert len(report.files) == 15 and len(site.asked) == 15
    assert report.received == sum(len(site.files[path]) for path in list_files("korquad-2.1"))


def test_lines_of_several_files_do_not_mix(site, tmp_path):
    speaking = threading.Lock()

    def announce(line):
        assert speaking.acquire(blocking=False), "two files spoke at once"
        time.sleep(0.005)
        speaking.release()

    fetch(site, tmp_path, "korquad-2.1", jobs=8, announce=announce)


def test_complete_files_are_verified_and_kept_without_a_request(site, tmp_path):
    fetch(site, tmp_path)
    site.asked.clear()
    lines: list[str] = []
    assert fetch(site, tmp_path, lines=lines).received == 0
    assert site.asked == []
    assert any(TRAIN in line and "already here, verified" in line for line in lines)


def test_a_damaged_file_already_there_is_fetched_again(site, tmp_path):
    fetch(site, tmp_path)
    (tmp_path / TRAIN).write_bytes(site.files[TRAIN][:-1000])
    lines: list[str] = []
    fetch(site, tmp_path, lines=lines)
    assert_whole(site, tmp_path)
    assert any("already here is damaged" in line for line in lines)


def test_licence_is_said_once_and_left_with_the_files(site, tmp_path):
    lines: list[str] = []
    fetch(site, tmp_path, lines=lines)
    fetch(site, tmp_path, lines=lines)
    assert lines.count(LICENCE) == 1 and "CC BY-ND 2.0 KR" in LICENCE
    assert (tmp_path / "KorQuAD-LICENSE").read_text() == LICENCE + "\n"


def test_published_sums_are_compared_and_a_difference_is_said(site, tmp_path, monkeypatch):
    body = site.files[TRAIN]
    monkeypatch.setitem(PUBLISHED, TRAIN, (len(body), hashlib.sha256(body).hexdigest()))
    monkeypatch.setitem(PUBLISHED, DEV, (len(site.files[DEV]), hashlib.sha256(b"another edition").hexdigest()))
    lines: list[str] = []
    report = fetch(site, tmp_path, lines=lines)
    assert [file.as_published for file in report.files] == [True, False]
    assert [TRAIN in line for line in lines if "not the edition on record" in line] == [False]


def test_the_table_adds_up_to_the_recorded_download_sizes():
    for dataset, total in (("korquad-1.0", 42_408_533), ("korquad-2.1", 1_373_763_305)):
        entries = [PUBLISHED[Path(path).name] for path in list_files(dataset)]
        assert sum(size for size, _ in entries) == total
        assert all(len(bytes.fromhex(digest)) == 32 for _, digest in entries)
    assert list_files("korquad-2.0")[13] == "KorQuAD_2.0/dev/KorQuAD_2.0_dev_00.zip"
    assert all(root.startswith("https://") and root.endswith("/dataset/") for root in ROOTS.values())


# ---------------------------------------------------------------- interrupted and continued


def test_a_cut_connection_continues_from_the_byte_reached(site, tmp_path):
    site.faults[TRAIN] = [{"cut": 100_000}]
    report = fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    first, second = site.requests(TRAIN)
    assert first["range"] is None
    assert (second["range"], second["if_range"]) == ("bytes=100000-", site.etag(site.files[TRAIN]))
    assert first["sent"] + second["sent"] == len(site.files[TRAIN]) == report.files[0].received


def test_tries_are_counted_only_while_nothing_moves(site, tmp_path):
    site.faults[TRAIN] = [{"cut": 30_000} for _ in range(8)]
    fetch(site, tmp_path, retries=1)
    assert_whole(site, tmp_path)
    assert len(site.requests(TRAIN)) == 9


def test_a_silent_server_times_out_and_is_asked_for_the_rest(site, tmp_path):
    site.faults[TRAIN] = [{"cut": 50_000, "hang": True}]
    lines: list[str] = []
    fetch(site, tmp_path, timeout=0.2, lines=lines)
    assert_whole(site, tmp_path)
    assert site.requests(TRAIN)[1]["range"] == "bytes=50000-"
    assert any("timed out" in line for line in lines)


def test_a_server_without_ranges_starts_cleanly_again(site, tmp_path):
    site.ranges = False
    site.faults[TRAIN] = [{"cut": 100_000}]
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert [entry["status"] for entry in site.requests(TRAIN)] == [200, 200]


def test_a_server_that_tells_no_length_is_read_to_its_end(site, tmp_path):
    site.faults[TRAIN] = [{"unsized": True}]
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)


@pytest.mark.parametrize("server", ["obeys If-Range", "weak ETag", "ignores If-Range"])
def test_a_file_changed_between_two_tries_is_never_stitched(site, tmp_path, server):
    site.weak, site.obeys_if_range = server == "weak ETag", server != "ignores If-Range"
    old = site.etag(site.files[TRAIN])
    changed = make_json(99)
    assert len(changed) == len(site.files[TRAIN])  # the size alone would not tell
    site.faults[TRAIN] = [{"cut": 100_000}, {"before": lambda: site.files.update({TRAIN: changed})}]
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    second = site.requests(TRAIN)[1]
    assert second["if_range"] == (None if server == "weak ETag" else old)
    assert second["status"] == (200 if server == "obeys If-Range" else 206)


def test_without_etags_date_and_size_decide(site, tmp_path):
    site.etags = False
    shorter = make_json(5, 200_000)
    site.obeys_if_range = False
    site.faults[TRAIN] = [{"cut": 100_000}, {}, {"cut": 100_000}, {}]
    fetch(site, tmp_path / "same")
    assert [entry["range"] for entry in site.requests(TRAIN)] == [None, "bytes=100000-"]
    site.faults[TRAIN] = [{"cut": 100_000}, {"before": lambda: site.files.update({TRAIN: shorter})}]
    fetch(site, tmp_path / "other")
    assert (tmp_path / "other" / TRAIN).read_bytes() == shorter


def test_a_part_longer_than_the_file_starts_over(site, tmp_path):
    site.obeys_if_range = False
    site.faults[TRAIN] = [{"cut": 250_000}, {"before": lambda: site.files.update({TRAIN: make_json(5, 200_000)})}]
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert [entry["status"] for entry in site.requests(TRAIN)] == [200, 416, 200]


def test_an_unknown_part_is_not_built_upon(site, tmp_path):
    (tmp_path / f"{TRAIN}.part").write_bytes(b"{" * 1000)
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert site.requests(TRAIN)[0]["range"] is None


def test_a_redirect_keeps_the_range(site, tmp_path):
    site.faults[TRAIN] = [{"cut": 100_000}, {"redirect": site.url + "elsewhere/dataset/" + TRAIN}]
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert [entry["range"] for entry in site.requests(TRAIN)] == [None, "bytes=100000-", "bytes=100000-"]


def test_ctrl_c_leaves_parts_and_the_next_call_continues(site, tmp_path):
    site.faults[TRAIN] = [{"cut": 120_000, "hang": True}]
    script = (
        "import sys; from pathlib import Path; from koret.data.download import download\n"
        "download('korquad-1.0', Path(sys.argv[1]), base_url=sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path, site.url], stdout=-1, stderr=-1, text=True)
    part = tmp_path / f"{TRAIN}.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size == 120_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 5  # the socket's timeout is 30 s
    assert "KeyboardInterrupt" in errors and "the same command continues" in output
    assert part.stat().st_size == 120_000
    report = fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert report.files[0].received == len(site.files[TRAIN]) - 120_000


# ---------------------------------------------------------------- refusals and faults


def test_a_busy_server_is_asked_again(site, tmp_path):
    site.faults[TRAIN] = [{"status": 503}, {"status": 500}, {"status": 429}]
    lines: list[str] = []
    fetch(site, tmp_path, lines=lines)
    assert_whole(site, tmp_path)
    assert [line.split("answered ")[1][:3] for line in lines if "answered" in line] == ["503", "500", "429"]


def test_retry_after_is_respected(site, tmp_path):
    site.faults[TRAIN] = [{"status": 503, "headers": {"Retry-After": "1"}}]
    assert fetch(site, tmp_path).seconds >= 1.0


def test_the_wait_doubles(site, tmp_path):
    site.faults[TRAIN] = [{"status": 503}] * 3
    assert fetch(site, tmp_path, backoff=0.05).seconds >= 0.05 + 0.1 + 0.2


def test_a_server_that_stays_busy_is_given_up_with_its_address(site, tmp_path):
    site.faults[TRAIN] = [{"cut": 100_000}] + [{"status": 503}] * 10
    with pytest.raises(DownloadError, match=f"{site.url}{TRAIN}.*503.*run the same command again") as caught:
        fetch(site, tmp_path, retries=2)
    assert "0.1 MB kept" in str(caught.value)
    assert len(site.requests(TRAIN)) == 3  # the cut one and two more
    assert (tmp_path / DEV).read_bytes() == site.files[DEV]  # the other file still came
    site.faults.clear()
    fetch(site, tmp_path)
    assert site.requests(TRAIN)[-1]["range"] == "bytes=100000-"


def test_an_absent_file_is_final_and_named(site, tmp_path):
    del site.files[TRAIN]
    with pytest.raises(DownloadError, match=f"{site.url}{TRAIN}: not there \\(404\\)"):
        fetch(site, tmp_path)
    assert len(site.requests(TRAIN)) == 1
    assert not (tmp_path / TRAIN).exists()


def test_every_absent_file_is_named_and_the_corrected_edition_recommended(site, tmp_path):
    with pytest.raises(DownloadError, match="15 files could not be fetched") as caught:
        fetch(site, tmp_path, "korquad-2.0")
    assert str(caught.value).count("koret download korquad-2.1") == 15


def test_a_length_never_reached_ends_in_a_message(site, tmp_path):
    site.faults[TRAIN] = [{"extra": 77}] * 20
    size = len(site.files[TRAIN])
    with pytest.raises(DownloadError, match=f"{TRAIN}: connection cut after {size:,} of {size + 77:,} bytes"):
        fetch(site, tmp_path, retries=2)
    assert not (tmp_path / TRAIN).exists()


def test_a_length_too_small_is_seen_as_damage(site, tmp_path):
    site.faults[TRAIN] = [{"extra": -500}, {}]
    lines: list[str] = []
    fetch(site, tmp_path, lines=lines)
    assert_whole(site, tmp_path)
    assert any("arrived damaged" in line for line in lines)


def damage(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]


def test_a_zip_damaged_once_is_fetched_again(site, tmp_path):
    path = "KorQuAD_2.1/train/KorQuAD_2.1_train_03.zip"
    sound = site.files[path]
    site.files[path] = damage(sound)
    site.faults[Path(path).name] = [{}, {"before": lambda: site.files.update({path: sound})}]
    report = fetch(site, tmp_path, "korquad-2.1")
    assert_whole(site, tmp_path, "korquad-2.1")
    assert report.files[3].received == 2 * len(sound)


def test_a_zip_damaged_twice_is_an_error(site, tmp_path):
    path = "KorQuAD_2.1/dev/KorQuAD_2.1_dev_01.zip"
    site.files[path] = damage(site.files[path])
    with pytest.raises(DownloadError, match=f"{path} arrived damaged twice"):
        fetch(site, tmp_path, "korquad-2.1")
    assert len(site.requests(Path(path).name)) == 2
    assert not (tmp_path / path).exists()


@pytest.mark.parametrize("name", ["KorQuAD_2.1/train/KorQuAD_2.1_train_00.zip", TRAIN])
def test_a_web_page_instead_of_the_file_is_named(site, tmp_path, name):
    page = b"\n<!DOCTYPE html><html><head><title>Please log in</title></head></html>"
    site.faults[Path(name).name] = [{"body": page}]
    with pytest.raises(DownloadError, match=f"{name} gave a web page \\(Please log in\\) instead of"):
        fetch(site, tmp_path, "korquad-1.0" if name == TRAIN else "korquad-2.1")
    assert len(site.requests(Path(name).name)) == 1


def test_a_web_page_does_not_cost_the_part_already_here(site, tmp_path):
    site.faults[TRAIN] = [{"cut": 100_000}, {"body": b"<html>wifi</html>"}]
    with pytest.raises(DownloadError, match="something else .*wifi"):
        fetch(site, tmp_path)
    fetch(site, tmp_path)
    assert site.requests(TRAIN)[-1]["range"] == "bytes=100000-"


def test_no_server_at_all(site, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(DownloadError, match="no answer .*refused"):
        fetch(site, tmp_path, base_url=f"http://127.0.0.1:{port}/", retries=1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_said_in_words(site, tmp_path):
    (tmp_path / f"{TRAIN}.part").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=f"disk full while saving {TRAIN}.part"):
        fetch(site, tmp_path, jobs=1)
    assert site.requests(DEV) == []  # it would not have fitted either


def test_wrong_arguments_and_a_busy_or_impossible_folder(site, tmp_path):
    with pytest.raises(ValueError, match="korquad-3.*korquad-1.0, korquad-2.0, korquad-2.1"):
        fetch(site, tmp_path, "korquad-3")
    for address in ("ftp://mirror/dataset", "mirror.example/dataset", "http://"):
        with pytest.raises(ValueError, match="--base-url"):
            fetch(site, tmp_path, base_url=address)
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="choose another --dest"):
        fetch(site, tmp_path / "file")
    with lock_run(tmp_path), pytest.raises(RunBusy):
        fetch(site, tmp_path)


# ---------------------------------------------------------------- surroundings


def test_proxy_variables_are_respected(site, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", site.url.removesuffix("/dataset/"))
    fetch(site, tmp_path, base_url="http://korquad.invalid/dataset")
    assert_whole(site, tmp_path)
    assert {entry["url"] for entry in site.asked} == {f"http://korquad.invalid/dataset/{name}" for name in (TRAIN, DEV)}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_on_a_terminal_and_plain_lines_elsewhere(site, tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for name, screen in (("terminal", Terminal()), ("pipe", io.StringIO())):
        monkeypatch.setattr(sys, "stdout", screen)
        site.faults[TRAIN] = [{"cut": 100_000}, {"cut": 100_000}]
        fetch(site, tmp_path / name, announce=print, backoff=0.1)
        assert f"{TRAIN}: connection cut after 100,000 of" in screen.getvalue().replace("\n", " ")
        assert ("━" in screen.getvalue()) == (name == "terminal")
        assert ("\x1b[" in screen.getvalue()) == (name == "terminal")


def test_verification_refuses_what_is_not_whole(tmp_path):
    def write(name: str, body: bytes) -> Path:
        (tmp_path / name).write_bytes(body)
        return tmp_path / name

    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    body = make_zip(1)
    assert verify_file(write("KorQuAD_2.0_train_00.zip", body)) is None  # sound, no sum on record
    assert verify_file(write("KorQuAD_2.1_train_00.zip.part", body)) is False  # sound, and not the official bytes
    for wrong in (body[:-100], body[: len(body) // 2], damage(body), b"", empty.getvalue()):
        with pytest.raises(Damaged):
            verify_file(write("x.zip", wrong))
    body = make_json(1)
    for wrong in (body[:-2], b"", b"[]", b'{"version": "1"}', body + b"}"):
        with pytest.raises(Damaged):
            verify_file(write("x.json", wrong))
