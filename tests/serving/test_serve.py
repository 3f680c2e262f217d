"""koret serve over real sockets: real clients, the right vectors for everybody, every refusal in OpenAI's words."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from koret.commands.serve import name_model, read_key
from koret.retrieval.encoder import TextEncoder, load_encoder
from koret.retrieval.inference import E5KorQuADInference
from koret.retrieval.probe import probe_encoder
from koret.serving import server
from koret.serving.app import Service, make_app
from koret.serving.requests import MOST_CHARACTERS, MOST_TEXTS
from koret.web.server import bind

TEXTS = ["한라산의 높이는 얼마인가?", "세종은 1446년에 훈민정음을 반포하였다. " * 5, "e", "\x00 빈 값과 🙂"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model directory of two layers that reads digits and syllables apart: cheap, and every text its own vector."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("small")
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"0123456789번:pasequry가나다라 "]
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(dict.fromkeys(letters))}, [], unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Split("", "isolated")
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder / "backbone")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "backbone")
    body = Transformer(str(folder / "backbone"), max_seq_length=64)
    SentenceTransformer(modules=[body, Pooling(32, "mean"), Normalize()], device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def encoder(small) -> TextEncoder:
    return load_encoder(small, device="cpu")


def listen(encoder: TextEncoder, **options):
    """A running server in a thread: (base address, service)."""
    service, most = Service(encoder, "small", options.pop("max_queue", 4096)), options.pop("max_connections", None)
    app, own = make_app(service, **options), bind("127.0.0.1", 0)
    return service, server.PatientServer(app, most).serve_in_background(own)


@pytest.fixture(scope="module")
def address(encoder):
    service, serving = listen(encoder)
    with serving as address:
        yield address
    service.batcher.close()


def post(address: str, content, **options) -> httpx.Response:
    return httpx.post(f"{address}/v1/embeddings", json=content, timeout=60, **options)


# ---- right answers


@pytest.fixture(scope="module")
def offline():
    """The real base model: (its inference, the address it is served at)."""
    inference = E5KorQuADInference("offline", device="cpu")
    service, serving = listen(inference.encoder)
    with serving as address:
        yield inference, address
    service.batcher.close()


@pytest.mark.parametrize("encoding", ["float", "base64", openai.omit])
@pytest.mark.parametrize("kind", ["query", "passage", "document", None])
def test_openai_client_gets_the_vectors_of_inference(offline, encoding, kind):
    inference, address = offline
    expected = inference.encode_queries(TEXTS) if kind == "query" else inference.encode_passages(TEXTS)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        answer = client.embeddings.create(
            model="small", input=TEXTS, encoding_format=encoding, user="somebody",
            extra_body={"input_type": kind} if kind else None,
        )  # fmt: skip
    got = [np.frombuffer(base64.b64decode(d.embedding), "<f4") if encoding == "base64" else d.embedding
           for d in answer.data]  # fmt: skip
    assert [d.index for d in answer.data] == [0, 1, 2, 3]
    assert np.abs(np.array(got) - expected).max() < 1e-6
    read = inference.encoder.tokenize(TEXTS, "query" if kind == "query" else "passage")
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, read))


def test_names_that_end_in_the_kind_stand_for_input_type(offline):
    inference, address = offline
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        assert [m.id for m in client.models.list()] == ["small", "small-query", "small-passage"]
        assert client.models.retrieve("small-query").id == "small-query"
        vector = client.embeddings.create(model="small-query", input=TEXTS[0]).data[0].embedding
        with pytest.raises(openai.NotFoundError, match="this server has 'small'"):
            client.models.retrieve("text-embedding-3-small")
    assert np.abs(vector - inference.encode_query(TEXTS[0])).max() < 1e-6


def test_fewer_dimensions_are_the_first_ones_at_unit_length(address, encoder):
    expected = encoder.encode(["가나다"], "passage")[0, :5]
    answer = post(address, {"model": "small", "input": "가나다", "dimensions": 5}).json()
    got = np.array(answer["data"][0]["embedding"])
    assert got.shape == (5,) and np.isclose(np.linalg.norm(got), 1, atol=1e-6)
    assert np.allclose(got, expected / np.linalg.norm(expected), atol=1e-6)


def test_thousands_of_different_texts_at_once_and_none_swapped(encoder):
    texts = [f"{n}번" for n in range(1000)]
    expected = encoder.encode(texts, "passage")
    wide = expected.astype(np.float64)
    nearest = np.sqrt(2 - 2 * (wide @ wide.T - 2 * np.eye(1000)).max())
    assert nearest > 1e-4  # no two texts could be taken for each other: an answer is at most 6e-6 away
    service, serving = listen(encoder)
    rng = np.random.default_rng(0)
    cuts = np.split(rng.permutation(1000), np.sort(rng.choice(np.arange(1, 1000), 499, replace=False)))

    async def ask(client, rows, limit):
        async with limit:
            answer = await client.post(
                f"{address}/v1/embeddings",
                json={"model": "small", "input": [texts[i] for i in rows], "encoding_format": "float"},
            )
        return np.array([d["embedding"] for d in answer.raise_for_status().json()["data"]])

    async def ask_all():
        limit = asyncio.Semaphore(32)
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(ask(client, rows, limit) for rows in cuts))

    with serving as address:
        answers = asyncio.run(ask_all())
        values = read_metrics(address)
    service.batcher.close()
    for rows, got in zip(cuts, answers, strict=True):
        assert np.abs(got - expected[rows]).max() < 1e-6
    assert values["koret_texts_total", "passage"] == values["koret_batch_texts_sum", ""] == 1000
    assert values["koret_requests_total", "200"] == values["koret_request_seconds_count", ""] == 500
    tokens = sum(map(len, encoder.tokenize(texts, "passage")))
    assert values["koret_tokens_total", "passage"] == values["koret_batch_tokens_sum", ""] == tokens
    assert values["koret_queue_texts", ""] == 0
    assert values["koret_batch_texts_count", ""] < 500  # requests did share batches


def read_metrics(address: str) -> dict[tuple[str, str], float]:
    """Sample name and first label value -> value."""
    text = httpx.get(f"{address}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, next(iter(sample.labels.values()), "")): sample.value for sample in samples}


# ---- refusals

BAD = [
    (b"{", 400, "not JSON"),
    (b'{"input": "\xff"}', 400, "UTF-8"),
    (b'{"input": NaN, "model": "small"}', 400, "not JSON"),
    (b'{"input": "\\ud800", "model": "small"}', 400, "not JSON"),
    (b"[" * 100_000, 400, "not JSON"),
    (b"[]", 400, "JSON object"),
    ({"input": "가"}, 400, "'model' is missing"),
    ({"input": "가", "model": "gpt"}, 404, "this server has 'small'"),
    ({"input": "가", "model": ["small"]}, 404, "that is no text"),
    ({"model": "small"}, 400, "'input' must be"),
    ({"model": "small", "input": []}, 400, "'input' must be"),
    ({"model": "small", "input": {"text": "가"}}, 400, "'input' must be"),
    ({"model": "small", "input": ["가", 3]}, 400, r"'input\[1\]' is no text"),
    ({"model": "small", "input": ["가", " \n"]}, 400, r"'input\[1\]' is empty"),
    ({"model": "small", "input": ""}, 400, "'input' is empty"),
    ({"model": "small", "input": [1, 2, 3]}, 400, "token ids"),
    ({"model": "small", "input": [[1, 2], [3]]}, 400, "check_embedding_ctx_length"),
    ({"model": "small", "input": ["가"] * (MOST_TEXTS + 1)}, 400, "at most 2048"),
    ({"model": "small", "input": "가" * (MOST_CHARACTERS + 1)}, 400, "at most 1,000,000"),
    ({"model": "small", "input": "가", "dimensions": 33}, 400, "from 1 to 32"),
    ({"model": "small", "input": "가", "dimensions": 0}, 400, "from 1 to 32"),
    ({"model": "small", "input": "가", "dimensions": True}, 400, "from 1 to 32"),
    ({"model": "small", "input": "가", "encoding_format": "int8"}, 400, "'float', 'base64'"),
    ({"model": "small", "input": "가", "input_type": "title"}, 400, "'query', 'passage', 'document'"),
    ({"model": "small-query", "input": "가", "input_type": "passage"}, 400, "ends in '-query'"),
    ({"model": "small", "input": "가", "inputtype": "query"}, 400, "did you mean 'input_type'"),
]  # fmt: skip


@pytest.mark.parametrize("body, status, words", BAD)
def test_malformed_requests_are_refused_in_openais_shape(address, body, status, words):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(
        f"{address}/v1/embeddings", content=content, headers={"content-type": "application/json"}, timeout=60
    )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert re.search(words, error["message"])


def test_foreign_hosts_pages_and_addresses_are_refused(address):
    good = {"model": "small", "input": "가"}
    assert post(address, good, headers={"host": "evil.example"}).status_code == 421
    assert post(address, good, headers={"origin": "http://evil.example"}).status_code == 403
    assert httpx.post(f"{address}/v1/embeddings", content=b"{}").status_code == 415
    assert httpx.get(f"{address}/v1/embeddings").json()["error"]["message"] == "this address takes another method"
    assert httpx.get(f"{address}/docs").status_code == 404
    assert post(address, good).status_code == 200


def test_a_body_too_large_is_refused_before_it_is_read(encoder, monkeypatch):
    monkeypatch.setattr("koret.serving.guard.BODY_BYTES", 1000)
    service, serving = listen(encoder)
    with serving as address:
        answer = post(address, {"model": "small", "input": "가" * 2000})
    service.batcher.close()
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"


def test_requests_that_are_refused_are_counted_by_status(encoder, monkeypatch):
    monkeypatch.setattr("koret.serving.guard.BODY_BYTES", 1000)
    monkeypatch.setattr("koret.serving.guard.BODY_SECONDS", 0.3)
    service, serving = listen(encoder, key="s3cret")
    known = {"authorization": "Bearer s3cret"}
    with serving as address:
        where, good = f"{address}/v1/embeddings", {"model": "small", "input": "가"}
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(
                b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer s3cret\r\nContent-Length: 9\r\n\r\n{"
            )
            assert b" 408 " in slow.recv(100)
        statuses = [
            post(address, {"model": "small", "input": "가" * 2000}, headers=known).status_code,
            post(address, good).status_code,
            post(address, good, headers={**known, "host": "evil.example"}).status_code,
            httpx.post(where, content=b"{}", headers=known).status_code,
            httpx.get(where, headers=known).status_code,
            httpx.put(where, json=good, headers=known).status_code,
            post(address, good, headers=known).status_code,
        ]
        assert httpx.get(f"{address}/v1/models").status_code == 401  # another address: not among these
        text = httpx.get(f"{address}/metrics", headers=known).text
    service.batcher.close()
    assert statuses == [413, 401, 421, 415, 405, 405, 200]
    counted = dict(re.findall(r'^koret_requests_total{status="(\d+)"} (\S+)$', text, re.MULTILINE))
    assert counted == {"408": "1.0", "413": "1.0", "401": "1.0", "421": "1.0", "415": "1.0", "405": "2.0", "200": "1.0"}


def test_the_key_guards_everything_but_health(encoder, monkeypatch):
    monkeypatch.setenv("OWN_KEY", "s3cret")
    service, serving = listen(encoder, key=read_key("OWN_KEY"))
    with serving as address:
        assert httpx.get(f"{address}/health").json() == {"status": "ready", "model": "small"}
        for path in ("/metrics", "/v1/models"):
            assert httpx.get(f"{address}{path}").status_code == 401
            assert httpx.get(f"{address}{path}", headers={"authorization": "Bearer s3cret"}).status_code == 200
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="guess").embeddings.create(model="small", input="가")
        openai.OpenAI(base_url=f"{address}/v1", api_key="s3cret").embeddings.create(model="small", input="가")
    service.batcher.close()
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        read_key("NO_SUCH_KEY")


def hold(service: Service, monkeypatch) -> tuple[threading.Event, threading.Event]:
    """The encoder waits until the first event is set; the second says that it has something to do."""
    opened, entered, plain = threading.Event(), threading.Event(), service.encoder.encode_ids

    def encode_when_open(ids):
        entered.set()
        assert opened.wait(30)
        return plain(ids)

    monkeypatch.setattr(service.encoder, "encode_ids", encode_when_open)
    return opened, entered


def test_a_full_queue_answers_429_and_those_waiting_are_answered(encoder, monkeypatch):
    service, serving = listen(encoder, max_queue=2)
    opened, entered = hold(service, monkeypatch)
    with serving as address, ThreadPoolExecutor(3) as callers:
        running = callers.submit(post, address, {"model": "small", "input": "가"})
        assert entered.wait(30)
        waiting = callers.submit(post, address, {"model": "small", "input": ["나", "다"]})
        while service.batcher.waiting < 2:
            time.sleep(0.01)
        refused = post(address, {"model": "small", "input": "라"})
        opened.set()
        assert running.result().status_code == waiting.result().status_code == 200
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        assert client.embeddings.create(model="small", input="라").data
        values = read_metrics(address)
    service.batcher.close()
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert values["koret_requests_total", "429"] == 1 and values["koret_requests_total", "200"] == 3


def test_idle_connections_give_way_and_the_one_being_answered_stays(encoder, monkeypatch):
    service, serving = listen(encoder, max_connections=3)
    opened, entered = hold(service, monkeypatch)
    with serving as address:
        host, port = address.removeprefix("http://").split(":")
        with ThreadPoolExecutor(1) as callers:
            running = callers.submit(post, address, {"model": "small", "input": "가"})
            assert entered.wait(30)
            idle = []
            for _ in range(4):
                idle.append(socket.create_connection((host, int(port)), timeout=10))
                time.sleep(0.05)
            for one in idle[:2]:  # one busy and the last two idle ones are held
                with contextlib.suppress(ConnectionResetError):
                    assert one.recv(1) == b""
            idle[2].settimeout(0.3)
            with pytest.raises(TimeoutError):
                idle[2].recv(1)
            opened.set()
            assert running.result().status_code == 200
        for one in idle:
            one.close()
    service.batcher.close()


def test_a_client_that_hangs_up_frees_its_place(encoder, monkeypatch):
    service, serving = listen(encoder)
    opened, entered = hold(service, monkeypatch)
    with serving as address:
        with ThreadPoolExecutor(1) as callers:
            running = callers.submit(post, address, {"model": "small", "input": "가"})
            assert entered.wait(30)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/v1/embeddings", json={"model": "small", "input": ["나"] * 50}, timeout=0.5)
            while ("koret_requests_total", "499") not in read_metrics(address):
                time.sleep(0.01)
            opened.set()
            assert running.result().status_code == 200
        assert read_metrics(address)["koret_batch_texts_sum", ""] == 1
    service.batcher.close()


def test_vectors_that_are_not_finite_are_an_error_never_nan(encoder, monkeypatch):
    plain = encoder.encode_ids
    monkeypatch.setattr(encoder, "encode_ids", lambda ids: plain(ids) * np.float32(np.nan))
    service, serving = listen(encoder)
    with serving as address:
        answer = post(address, {"model": "small", "input": "가"})
    service.batcher.close()
    assert answer.status_code == 500 and "not finite for text 0" in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "non_finite"


def test_a_fast_path_that_disagrees_is_not_served(encoder, monkeypatch):
    assert probe_encoder(encoder) > 0.99999
    plain = encoder.encode_ids
    monkeypatch.setattr(encoder, "encode_ids", lambda ids, **options: np.roll(plain(ids), 1, axis=1))
    with pytest.raises(RuntimeError, match="is not used"):
        probe_encoder(encoder)


def test_a_comparison_that_is_no_number_proves_nothing(encoder, monkeypatch):
    plainly = encoder.embed_plainly
    monkeypatch.setattr(encoder, "embed_plainly", lambda text: plainly(text) * np.float32(np.nan))
    with pytest.raises(RuntimeError, match="only to cosine nan"):
        probe_encoder(encoder)


# ---- the command


def test_sigterm_answers_what_was_accepted_refuses_new_and_exits_0(small):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "koret.cli", "serve", str(small), "--port", str(port), "--served-name", "small"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while "Stop with Ctrl-C" not in (line := process.stdout.readline()):
            assert line, "the server ended before it was ready"
        while True:
            try:
                assert httpx.get(f"{address}/health").status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.05)
        texts = [f"{n}번 가나다라 " * 4 for n in range(300)]
        with ThreadPoolExecutor(4) as callers:
            asked = [callers.submit(post, address, {"model": "small", "input": texts}) for _ in range(4)]
            while read_metrics(address)["koret_queue_texts", ""] < 600:
                pass
            process.send_signal(signal.SIGTERM)
            assert [len(one.result().json()["data"]) for one in asked] == [300] * 4
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
        assert process.wait(30) == 0
        assert "every accepted request was answered" in process.stdout.read()
    finally:
        process.kill()


def test_models_are_called_by_their_run_or_directory(small):
    assert name_model(str(small)) == "model" and name_model("offline") == "offline"
    run = small.parent
    (run / "status.json").write_text('{"state": "finished"}')
    assert name_model(str(run)) == run.name == name_model(str(small))
