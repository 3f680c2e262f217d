"""The page's JSON: searches against the index asked directly, many at once, own passages, the report."""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from koret.web.batching import Busy, MicroBatcher
from koret.web.questions import Question, Questions
from koret.web.server import share_often

COLUMNS = ["m0", "m1", "bm25", "hybrid"]


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address, timeout=30) as one:
        yield one


def ask(client, query: str, columns=COLUMNS, k: int = 5) -> dict:
    answer = client.post("/api/search", json={"query": query, "columns": columns, "k": k})
    assert answer.status_code == 200, answer.text
    return answer.json()


def list_ranking(answer: dict, column: str) -> list[tuple[str, float]]:
    hits = next(one for one in answer["columns"] if one["id"] == column)["hits"]
    return [(answer["passages"][hit["passage"]]["id"], hit["score"]) for hit in hits]


def test_the_state_names_base_and_tuned_and_the_held_out_questions(client, opened):
    state = client.get("/api/state").json()
    assert [column["kind"] for column in state["columns"]] == ["base", "tuned", "bm25", "hybrid"]
    assert state["report"] == opened.report.run.name
    assert state["questions"] == opened.report.describe()["task"]["queries"] > 0
    assert state["corpus"]["passages"] == 48


def test_each_column_is_what_its_index_says(client, opened):
    query = opened.desk.questions.pick_examples()[0]
    answer = ask(client, query)
    base, tuned = (model.index for model in opened.desk._models)
    for column, hits in (
        ("m0", base.search([query], 5)[0]),
        ("m1", tuned.search([query], 5)[0]),
        ("bm25", tuned.search_lexical([query], 5)[0]),
    ):
        found = list_ranking(answer, column)
        assert [name for name, _ in found] == [hit.entry.id for hit in hits]
        assert [score for _, score in found] == pytest.approx([hit.score for hit in hits], abs=1e-5)
    fused = tuned.fuse(tuned.search([query], 50)[0], tuned.search_lexical([query], 50)[0], 5)
    assert [name for name, _ in list_ranking(answer, "hybrid")] == [hit.entry.id for hit in fused]


def test_gold_is_marked_for_questions_of_the_evaluation_only(client, opened):
    question = opened.desk.questions.find(opened.desk.questions.pick_examples()[0])
    answer = ask(client, f"  {question.text} ")
    golden = [one for one in answer["passages"].values() if one["gold"]]
    assert answer["known"] and answer["answers"] == list(question.answers)
    assert all((one["heading"], one["text"]) in question.gold for one in golden)
    for column in answer["columns"]:
        shown = [hit["rank"] for hit in column["hits"] if answer["passages"][hit["passage"]]["gold"]]
        assert not shown or min(shown) == column["gold_rank"]
    assert any(column["gold_rank"] for column in answer["columns"])
    other = ask(client, "아무도 묻지 않은 것")
    assert not other["known"] and not any(one["gold"] for one in other["passages"].values())


def test_concurrent_questions_get_their_own_answers(client, address, opened):
    texts = [question.text for question in opened.desk.questions._all] + [f"가마 나바 {i} 다사" for i in range(40)]
    alone = {text: ask(client, text) for text in texts}
    wanted = texts * 3

    def ask_once(text: str) -> tuple[str, dict]:
        with httpx.Client(base_url=address, timeout=60) as own:
            return text, ask(own, text)

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask_once, wanted))
    assert len(together) == len(wanted)
    for text, answer in together:
        assert answer["query"] == text.strip()
        for column in COLUMNS:
            one, other = list_ranking(answer, column), list_ranking(alone[text], column)
            assert [score for _, score in one] == pytest.approx([score for _, score in other], abs=1e-5)
            if len({round(score, 4) for _, score in other}) == len(other):  # equal scores may change places
                assert [name for name, _ in one] == [name for name, _ in other]


def test_only_wanted_columns_are_answered_in_the_page_order(client):
    answer = ask(client, "가마 나바", ["hybrid", "m0"])
    assert [column["id"] for column in answer["columns"]] == ["m0", "hybrid"]


def test_own_passages_are_ranked_by_each_model(client, opened):
    passages = ["가마 나바 다사", "라자 마차 바카", "가마 나바 다사 라자"]
    body = {"query": "가마 나바", "passages": [*passages, "  "], "columns": COLUMNS}
    answer = client.post("/api/rank", json=body).json()
    encoder = opened.desk._models[0].index.encoder
    scores = encoder.encode(passages, "passage") @ encoder.encode(["가마 나바"], "query")[0]
    ranked = sorted(range(3), key=lambda i: -scores[i])
    assert list_ranking(answer, "m0") == [(str(i), pytest.approx(float(scores[i]), abs=1e-5)) for i in ranked]
    assert [name for name, _ in list_ranking(answer, "bm25")] == ["0", "2"]  # the shorter text first, no overlap: none


def test_the_report_is_the_runs_own(client, opened):
    report = client.get("/api/report").json()
    written = json.loads((opened.report.run.path / "evaluation" / "report.json").read_bytes())
    assert report["verdict"] == written["tasks"][0]["verdict"]
    assert report["counts"]["wins"] + report["counts"]["losses"] + report["counts"]["ties"] == report["counts"]["all"]
    assert report["counts"]["all"] == len(opened.desk.questions)
    steps = [point[0] for point in report["curves"]["train/loss"]]
    assert steps == sorted(steps) and len(steps) > 3
    assert report["slices"] and all(0 <= s["systems"]["tuned"]["mean"] <= 1 for s in report["slices"])


@pytest.mark.parametrize("kind", ["wins", "losses", "ties", "all"])
def test_questions_are_listed_by_their_change(client, kind):
    counted = client.get("/api/report").json()["counts"][kind]
    found = client.get("/api/report/questions", params={"kind": kind, "count": 100}).json()
    changes = [one["change"] for one in found["questions"]]
    assert found["total"] == counted
    assert {"wins": all(c > 0 for c in changes), "losses": all(c < 0 for c in changes),
            "ties": not any(changes), "all": True}[kind]  # fmt: skip
    assert changes == sorted(changes, reverse=kind != "losses")


def test_no_count_lists_more_than_the_cap(client, opened, monkeypatch):
    asked = []
    monkeypatch.setattr(opened.report, "list_questions", lambda *values: asked.append(values[2:]) or {})
    for count in (-1, -(10**9), 20, 10**9):
        assert client.get("/api/report/questions", params={"count": count, "start": -3}).status_code == 200
    assert asked == [(0, 0), (0, 0), (0, 20), (0, 100)]


def test_completions_begin_with_what_was_typed(client, opened):
    text = opened.desk.questions.pick_examples()[0]
    assert text in client.get("/api/questions", params={"text": text[:4]}).json()["questions"]
    assert client.get("/api/questions", params={"text": "   "}).json() == {"questions": []}


def test_questions_fold_case_spaces_and_jamo():
    questions = Questions(
        [Question("1", "가야금은  무엇인가", (), frozenset()), Question("2", "What?", (), frozenset())]
    )
    assert questions.find("가야금은 무엇인가").id == "1"
    assert questions.find("what?").id == "2"
    assert questions.complete("무엇") == ["가야금은  무엇인가"]


def test_the_second_start_encodes_nothing(log_dir, opened):
    from koret.web.opening import open_page

    said = []
    again = open_page(log_dir=log_dir, say=said.append)
    assert said == [] and again.desk.passages == opened.desk.passages
    again.close()


def test_a_saved_index_opens_with_its_own_model(log_dir, tmp_path):
    from koret.retrieval.index import build_index
    from koret.web.opening import open_page

    data = log_dir.parent / "data.json"
    build_index(str(log_dir.parent / "tiny"), data, tmp_path / "index").close()
    page = open_page(indexes=[str(tmp_path / "index")])
    assert [column.kind for column in page.desk.columns] == ["model", "bm25", "hybrid"] and page.report is None
    page.close()
    with pytest.raises(ValueError, match="2 models and 1 indexes"):
        open_page(["a", "b"], [str(tmp_path / "index")])


def test_an_index_without_words_has_no_columns_of_words(log_dir, tmp_path):
    from koret.retrieval.index import build_index
    from koret.web.app import make_app
    from koret.web.opening import open_page
    from koret.web.server import Server, bind

    build_index(str(log_dir.parent / "tiny"), log_dir.parent / "data.json", tmp_path / "index", lexical=()).close()
    page = open_page(indexes=[str(tmp_path / "index")])
    with bind("127.0.0.1", 0) as own, Server(make_app(page)).serve_in_background(own) as where:
        with httpx.Client(base_url=where, timeout=30) as client:
            assert [column["id"] for column in client.get("/api/state").json()["columns"]] == ["m0"]
            assert [column["id"] for column in ask(client, "가마 나바")["columns"]] == ["m0"]
            body = {"query": "가마 나바", "passages": ["가마"], "columns": COLUMNS}
            assert [one["id"] for one in client.post("/api/rank", json=body).json()["columns"]] == ["m0"]
            refused = client.post("/api/search", json={"query": "가마 나바", "columns": ["bm25"]})
            assert refused.status_code == 400 and refused.json()["error"]["code"] == "columns"
    page.close()


def test_questions_in_another_precision_meet_the_same_passages(log_dir, opened, monkeypatch):
    from koret.retrieval import probe
    from koret.web.opening import open_page

    page = open_page(log_dir=log_dir, precision="bf16")
    assert page.desk.precisions == ["bf16", "bf16"] and opened.desk.precisions == ["fp32", "fp32"]
    query = opened.desk.questions.pick_examples()[0]
    for half, full in zip(page.desk._models, opened.desk._models, strict=True):
        (vector,), (exact,) = (model.encoder.encode([query], "query") for model in (half, full))
        assert 0.99 < float(vector @ exact) < 1 - 1e-7
        own, found = half.worker.ask(query).result(), half.index.search_vectors(vector[None], 50)[0]
        assert [(hit.entry.id, hit.score) for hit in own] == [(hit.entry.id, hit.score) for hit in found]
        assert half.index.encoder.precision == "fp32"
    page.close()
    monkeypatch.setitem(probe.LEAST_COSINE, "bf16", 1.1)
    with pytest.raises(RuntimeError, match="is not used: its vectors in bf16 agree"):
        open_page(log_dir=log_dir, precision="bf16")


def test_without_a_run_the_way_on_is_named(tmp_path):
    from koret.web.opening import open_page

    with pytest.raises(FileNotFoundError, match="koret web offline --dataset-root sample"):
        open_page(log_dir=tmp_path)


def test_threads_hand_the_lock_on_more_often_only_while_the_page_is_served():
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), share_often():
        assert sys.getswitchinterval() < before
        raise KeyError
    assert sys.getswitchinterval() == before


class TestMicroBatcher:
    def test_what_waits_is_answered_together_and_in_place(self):
        entered, opened, sizes = threading.Event(), threading.Event(), []

        def answer(items):
            sizes.append(len(items))
            entered.set()
            opened.wait(10)
            return [item * 10 for item in items]

        batcher = MicroBatcher(answer, "test", most=8)
        first = batcher.ask(0)
        assert entered.wait(10)
        waiting = [batcher.ask(i) for i in range(1, 13)]
        opened.set()
        assert [future.result(10) for future in (first, *waiting)] == [i * 10 for i in range(13)]
        assert sizes == [1, 8, 4]
        batcher.close()

    def test_one_bad_item_spoils_only_itself(self):
        entered, opened = threading.Event(), threading.Event()

        def answer(items):
            entered.set()
            opened.wait(10)
            return [1 / item for item in items]

        batcher = MicroBatcher(answer, "test")
        first = batcher.ask(1)
        assert entered.wait(10)
        futures = [batcher.ask(item) for item in (2, 0, 4)]
        opened.set()
        assert first.result(10) == 1
        assert [futures[0].result(10), futures[2].result(10)] == [0.5, 0.25]
        assert isinstance(futures[1].exception(10), ZeroDivisionError)
        batcher.close()

    def test_items_go_before_pieces_and_too_many_are_refused(self):
        opened, order = threading.Event(), []
        batcher = MicroBatcher(lambda items: order.extend(items) or items, "test")
        batcher.run(lambda: opened.wait(10))
        time.sleep(0.05)
        pieces = [batcher.run(lambda n=n: order.append(f"piece {n}")) for n in range(2)]
        asked = [batcher.ask(n) for n in range(256)]
        with pytest.raises(Busy):
            batcher.ask(256)
        opened.set()
        for future in (*asked, *pieces):
            future.result(10)
        assert order[-2:] == ["piece 0", "piece 1"]
        batcher.close()
