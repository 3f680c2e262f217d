"""Mined negatives: against brute force, false ones dropped and counted, a file that is checked, and training on it."""

import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from crashes import read_outcome
from rich.console import Console
from toys import make_dataset, train_until

from koret import cli
from koret.data.keys import fold_text, normalize_answer, text_key
from koret.data.pairs import build_pairs, known_mask, split_articles
from koret.retrieval import lexical
from koret.retrieval.encoder import load_encoder
from koret.runs import find_runs
from koret.training import mining, negatives
from koret.training.mining import MiningSettings, cut_shingles, measure_overlap, mine_negatives, read_passages
from koret.training.negatives import NegativesError, list_by_question, read_negatives, write_negatives
from koret.training.preparation import prepare_job
from koret.training.resume import SettingsChanged
from koret.training.trainer import EmbeddingTrainer

ORIGIN = {"model": "tiny", "train_split": 0.7, "seed": 42}


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return load_encoder(tiny_model, max_seq_length=48, device="cpu")


@pytest.fixture(scope="module")
def train(toy_data):
    return split_articles(toy_data, 0.7, 42)[0]


@pytest.fixture(scope="module")
def tricky():
    """Toy data in which some passages are copies, parts, or hold the answer of a question of another article."""
    data = make_dataset(articles=8, paragraphs=3, questions=3, seed=4)
    passages, questions = data.passages.to_pylist(), data.questions.to_pylist()
    texts = [p["text"] for p in passages]
    texts[4] = texts[0]  # a copy of a positive in another article
    texts[7] = texts[1][: 3 * len(texts[1]) // 4]  # most of a positive
    texts[10] = texts[11]  # two equal candidates
    texts[13] += f" {questions[2]['answers'][0]}는"  # another article's answer, with a particle
    for row, (passage, text) in enumerate(zip(passages, texts, strict=True)):
        passage |= {"text": text, "end": len(text), "text_key": text_key(text)}
        for question in questions:
            if question["best"] == row and question["answers"][0] not in text:
                question |= {"best": -1, "gold": [], "known": []}
    questions[20] |= {"text": questions[2]["text"], "question_key": questions[2]["question_key"]}  # asked again
    built = {"passages": passages, "questions": questions}
    tables = {n: type(data.passages).from_pylist(rows, getattr(data, n).schema) for n, rows in built.items()}
    return dataclasses.replace(data, **tables)


def judge_by_definition(data, rows, candidates, scores, positive_scores, settings):
    """(kept, reason -> count) for lists of candidates, written down from the documentation."""
    passages, questions = data.passages.to_pylist(), data.questions.to_pylist()
    kept, counts = [], {}
    for row, found, own, positive_score in zip(rows, candidates, scores, positive_scores, strict=True):
        question = questions[row]
        same = [q for q in questions if q["text"] == question["text"]]
        known = {passages[p]["text"] for q in same for p in q["known"]}
        answers = [normalize_answer(a) for a in question["answers"]]
        best = cut_shingles(fold_text(passages[question["best"]]["text"]))
        chosen, seen, passed = [], set(), 0
        for passage, score in zip(found, own, strict=True):
            if passage < 0:
                continue
            text = passages[passage]["text"]
            if text in known:
                reason = mining.KNOWN
            elif passed < settings.skip_top:
                passed, reason = passed + 1, mining.SKIPPED
            elif text in seen:
                reason = mining.COPY
            elif len(chosen) == settings.per_question:
                reason = mining.BEYOND
            elif settings.margin_relative is not None and not score <= settings.margin_relative * positive_score:
                reason = mining.MARGIN
            elif settings.margin_absolute is not None and not score <= positive_score - settings.margin_absolute:
                reason = mining.MARGIN
            elif any(len(a) >= 2 and a in fold_text(text) for a in answers):
                reason = mining.ANSWER
            elif measure_overlap(cut_shingles(fold_text(text)), best) >= mining.NEAR:
                reason = mining.DUPLICATE
            else:
                chosen.append(passage)
                reason = None
            seen.add(text)
            if reason:
                counts[reason] = counts.get(reason, 0) + 1
        kept.append(chosen)
    return kept, counts


@pytest.mark.parametrize(
    "settings",
    [
        MiningSettings(depth=15, per_question=3, margin_relative=None),
        MiningSettings(depth=100, per_question=2, margin_relative=0.9),
        MiningSettings(depth=9, per_question=9, skip_top=2, margin_relative=None, margin_absolute=0.01),
        MiningSettings("bm25", depth=12, per_question=4, margin_relative=0.8),
        MiningSettings("bm25", depth=12, per_question=4, margin_relative=None),
    ],
)
def test_mining_equals_brute_force_and_its_counts_add_up(tricky, encoder, settings, monkeypatch):
    monkeypatch.setattr(mining, "PASSAGES_AT_ONCE", 5)
    monkeypatch.setattr(mining, "QUESTIONS_AT_ONCE", 7)
    articles = np.array([0, 1, 2, 3, 4, 6])
    mined = mine_negatives(tricky, articles, encoder, settings)
    questions = tricky.questions.to_pylist()
    rows = [i for i, q in enumerate(questions) if q["article"] in articles and q["best"] >= 0]
    assert mined.questions.tolist() == rows
    corpus = np.array([i for i, p in enumerate(tricky.passages.to_pylist()) if p["article"] in articles])
    asked, texts = [questions[i]["text"] for i in rows], read_passages(tricky, corpus)
    if settings.source == "bm25":
        order, scores = lexical.LexicalIndex(texts).search(asked, settings.depth)
        positives = np.full(len(rows), np.nan)
        for i, row in enumerate(rows):
            hit = np.flatnonzero(np.where(order[i] >= 0, corpus[order[i]], -1) == questions[row]["best"])
            positives[i] = scores[i][hit[0]] if len(hit) else np.nan
    else:
        asked, texts = encoder.encode(asked, "query"), encoder.encode(texts, "passage")
        all_scores = asked.astype(np.float64) @ texts.astype(np.float64).T
        order = np.argsort(-all_scores, axis=1, kind="stable")[:, : settings.depth]
        scores = np.take_along_axis(all_scores, order, axis=1)
        place = {int(row): i for i, row in enumerate(corpus)}
        positives = np.array([all_scores[i, place[questions[row]["best"]]] for i, row in enumerate(rows)])
    candidates = np.where(order >= 0, corpus[order], -1)
    kept, counts = judge_by_definition(tricky, rows, candidates, scores, positives, settings)
    assert [mined.negatives[i].tolist() for i in range(len(rows))] == kept
    assert mined.report["dropped"] == counts and mined.report["kept"] == sum(map(len, kept))
    assert mined.report["candidates"] == mined.report["kept"] + sum(counts.values()) == (candidates >= 0).sum()
    np.testing.assert_allclose(mined.positive_scores, positives, atol=1e-5)
    found = [scores[i][list(candidates[i]).index(p)] for i, chosen in enumerate(kept) for p in chosen]
    np.testing.assert_allclose(mined.scores, found, atol=1e-5)


def test_the_data_has_every_reason_to_drop_a_candidate(tricky, encoder):
    found = set()
    for settings in (
        MiningSettings(depth=24, per_question=24, skip_top=1, margin_relative=None),
        MiningSettings(depth=24, per_question=1),
    ):
        found |= set(mine_negatives(tricky, np.arange(8), encoder, settings).report["dropped"])
    assert found == set(mining.REASONS)


def test_both_sources_share_a_list_rank_by_rank_with_the_models_scores(toy_data, encoder, train):
    alone = {
        s: mine_negatives(toy_data, train, encoder, MiningSettings(s, 6, 99, 0, None, None)) for s in mining.SOURCES
    }
    both = alone["both"]
    for i in range(len(both.questions)):
        model, words = (alone[s].negatives[i].tolist() for s in ("model", "bm25"))
        assert set(both.negatives[i]) == {*model, *words}
        piece = slice(both.negatives.offsets[i], both.negatives.offsets[i + 1])
        for passage, source in zip(both.negatives[i].tolist(), both.sources[piece].tolist(), strict=True):
            assert mining.SOURCES[source] == (
                "both" if {passage} <= {*model} & {*words} else "model" if passage in model else "bm25"
            )
    asked = encoder.encode(toy_data.questions.column("text").to_pylist(), "query")
    texts = encoder.encode(read_passages(toy_data, np.arange(toy_data.passages.num_rows)), "passage")
    owner = np.repeat(both.questions, np.diff(both.negatives.offsets))
    expected = np.einsum("nd,nd->n", asked[owner], texts[both.negatives.values])
    np.testing.assert_allclose(both.scores, expected, atol=1e-5)
    np.testing.assert_array_equal(both.positive_scores, alone["model"].positive_scores)


def test_margins_by_hand():
    assert MiningSettings().find_limit(0.8) == pytest.approx(0.76)
    assert MiningSettings().find_limit(-0.2) == pytest.approx(-0.21)
    assert MiningSettings(margin_absolute=0.1).find_limit(0.8) == pytest.approx(0.7)
    assert MiningSettings(margin_relative=None).find_limit(0.8) == np.inf
    assert np.isnan(MiningSettings().find_limit(np.nan))
    for wrong in ({"depth": 0}, {"per_question": 0}, {"skip_top": -1}, {"source": "bm26"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MiningSettings(**wrong)


# ---------------------------------------------------------------- the file


@pytest.fixture
def mined_file(toy_data, encoder, train, tmp_path):
    settings = MiningSettings("both", depth=8, per_question=3, margin_relative=None)
    mined = mine_negatives(toy_data, train, encoder, settings)
    path = tmp_path / "negatives.jsonl"
    write_negatives(path, mined, toy_data, settings, ORIGIN)
    return path, mined


def test_the_file_says_what_was_mined_and_reads_back(mined_file, toy_data, train):
    path, mined = mined_file
    first, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert first["report"] == mined.report and first["seed"] == 42 and first["scores"] == "cosine"
    assert len(lines) == len(mined.questions)
    for i, line in enumerate(lines):
        question = toy_data.questions.slice(int(mined.questions[i]), 1).to_pylist()[0]
        assert (line["question"], line["article"]) == (question["id"], question["article"])
        assert line["positive"]["passage"] == question["best"]
        for negative in line["negatives"]:
            passage = toy_data.passages.slice(negative["passage"], 1).to_pylist()[0]
            assert {k: negative[k] for k in ("article", "start", "end")} == {
                k: passage[k] for k in ("article", "start", "end")
            }
    again, header = read_negatives(path, toy_data, train)
    assert header["model"] == "tiny" and len(header["sha256"]) == 64
    for field in dataclasses.fields(mined):
        old, new = getattr(mined, field.name), getattr(again, field.name)
        if field.name == "negatives":
            assert old.offsets.tolist() == new.offsets.tolist() and old.values.tolist() == new.values.tolist()
        else:
            np.testing.assert_array_equal(old, new)


def test_a_file_of_other_data_of_the_other_side_or_cut_off_is_refused(mined_file, toy_data, train, tmp_path):
    path, _ = mined_file
    with pytest.raises(NegativesError, match="other data"):
        read_negatives(path, make_dataset(seed=1), train)
    with pytest.raises(NegativesError, match=r"holds \d+ questions and \d+ passages .* train_split 0.7 and seed 42"):
        read_negatives(path, toy_data, train[:-1])
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-200], b"", b"{}\n", b"[1]\n", whole.rstrip().rpartition(b"\n")[0]):
        path.write_bytes(broken)
        with pytest.raises(NegativesError, match="make it again with koret mine"):
            read_negatives(path, toy_data, train)
    with pytest.raises(FileNotFoundError, match="hard_negatives"):
        read_negatives(tmp_path / "nowhere.jsonl", toy_data, train)


def test_mined_negatives_join_the_pairs_with_their_scores(mined_file, toy_data, train, make_config, encoder):
    path, mined = mined_file
    job = prepare_job(make_config(hard_negatives=str(path), negatives_per_question=2), encoder, toy_data)
    pairs = job.pairs
    place = {int(row): i for i, row in enumerate(mined.questions)}
    texts = read_passages(toy_data, np.arange(toy_data.passages.num_rows))
    for row in range(len(pairs)):
        i = place[int(pairs.question[row])]
        at = slice(mined.negatives.offsets[i], mined.negatives.offsets[i + 1])
        own = slice(pairs.negatives.offsets[row], pairs.negatives.offsets[row + 1])
        assert [pairs.texts[t] for t in pairs.negatives[row]] == [texts[p] for p in mined.negatives.values[at][:2]]
        np.testing.assert_array_equal(pairs.negative_scores[own], mined.scores[at][:2])
        assert pairs.positive_scores[row] == mined.positive_scores[i]
    assert job.report["hard_negatives"] == len(pairs.negatives.values) > len(pairs)
    assert job.report["mined"]["model"] == "tiny"
    mask = known_mask(pairs, np.arange(len(pairs)), np.arange(len(pairs.texts)))
    owner, named = pairs.negatives.take(np.arange(len(pairs)))
    assert not mask[owner, named].any()  # a mined negative is never masked for its own question
    plain = prepare_job(make_config(), encoder, toy_data)
    assert plain.pairs.question.tolist() == pairs.question.tolist() and plain.report["mined"] is None
    for batching in ("shuffle", "article"):
        orders = [
            [
                rows.tolist()
                for step in prepare_job(c, encoder, toy_data).schedule.steps_after(0)
                for rows in step.batches
            ]
            for c in (make_config(batching=batching), make_config(batching=batching, hard_negatives=str(path)))
        ]
        assert orders[0] == orders[1]


def test_a_mined_passage_that_answers_is_dropped_and_counted(toy_data, train):
    lists = list_by_question(
        mining.Mined(
            questions=np.array([0, 1]), positives=np.array([0, 0]), positive_scores=np.zeros(2, np.float32),
            negatives=mining.Csr.from_lists([[0, 5], [7]]), scores=np.zeros(3, np.float32),
            sources=np.zeros(3, np.int8), measure="bm25", report={},
        ), toy_data, 9,
    )  # fmt: skip
    pairs = build_pairs(toy_data, np.arange(12), mined=lists)
    texts = toy_data.passages.column("text").to_pylist()
    assert [[pairs.texts[t] for t in pairs.negatives[row]] for row in (0, 1, 2)] == [[texts[5]], [texts[7]], []]
    assert pairs.dropped_negatives == 1
    assert not known_mask(pairs, np.array([0]), pairs.negatives[0]).any()


# ---------------------------------------------------------------- training


def test_training_on_mined_negatives_and_going_on_with_the_same_file_only(mined_file, make_config, toy_data, tmp_path):
    path, _ = mined_file
    config = make_config(hard_negatives=str(path), batching="article")
    said = io.StringIO()
    trainer = EmbeddingTrainer(config, dataset=toy_data, console=Console(file=said, width=300))
    run = trainer.train()
    assert run.state == "finished" and run.data["mined"]["report"]["kept"] > 0
    assert "and the curated negatives there" in said.getvalue()
    (run.path / "status.json").write_text(json.dumps({**run.status, "state": "interrupted"}))
    path.write_bytes(path.read_bytes().replace(b'"tiny"', b'"other"'))
    with pytest.raises(SettingsChanged, match="the file of hard negatives changed"):
        EmbeddingTrainer.resume(run.path, dataset=toy_data, console=Console(file=io.StringIO())).train()
    missing = make_config(hard_negatives=str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match="make it with koret mine"):
        EmbeddingTrainer(missing, dataset=toy_data, console=Console(file=io.StringIO())).train()


def test_answers_that_stand_in_no_passage_are_trained_on_and_not_mined_for(make_config, toy_data):
    columns = {field.name: toy_data.questions.column(field.name).to_pylist() for field in toy_data.questions.schema}
    gone = range(0, toy_data.questions.num_rows, 5)
    for row in gone:
        columns["best"][row], columns["gold"][row], columns["known"][row] = -1, [], []
    schema = toy_data.questions.schema
    questions = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    data = dataclasses.replace(toy_data, questions=questions)
    config = make_config(positives="answer", remine_every=1, num_epochs=2, max_steps=None, save_steps=1000)
    trainer = EmbeddingTrainer(config, dataset=data, console=Console(file=io.StringIO()))
    run = trainer.train()
    assert run.state == "finished" and len(trainer.job.pairs.negatives.values) > 0
    asked = [json.loads(line) for line in (run.path / "negatives" / "epoch-0001.jsonl").read_text().splitlines()[1:]]
    without = {columns["id"][row] for row in gone}
    assert asked and not without & {line["question"] for line in asked}
    assert set(trainer.job.pairs.question) & set(gone)
    for row in range(len(columns["best"])):
        columns["best"][row], columns["gold"][row], columns["known"][row] = -1, [], []
    questions = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    trainer = EmbeddingTrainer(config, dataset=dataclasses.replace(toy_data, questions=questions))
    with pytest.raises(ValueError, match="remine_every: no question here has a passage"):
        trainer.train()


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop_at", ["during mining", "after mining", "in the last epoch", "before mining"])
def test_remining_and_a_resume_anywhere_give_the_weights_of_an_unbroken_run(make_config, toy_data, tmp_path, stop_at):
    """Three epochs, mined after each but the last; stopped around the second mining, or far from it."""
    settings = dict(
        max_steps=None, num_epochs=3, remine_every=1, negatives_per_question=2, save_steps=5, batching="article"
    )
    whole = EmbeddingTrainer(make_config(**settings, log_dir=str(tmp_path / "whole")), dataset=toy_data,
                             console=Console(file=io.StringIO()))  # fmt: skip
    run = whole.train()
    per_epoch = whole.job.schedule.steps_of_epoch[0]
    assert sorted(p.name for p in (run.path / "negatives").iterdir()) == ["epoch-0001.jsonl", "epoch-0002.jsonl"]
    contents = [p.read_bytes() for p in sorted((run.path / "negatives").iterdir())]
    assert contents[0] != contents[1]
    assert whole.job.pairs.negatives.values.size > 0

    config = make_config(**settings, log_dir=str(tmp_path / "broken"))
    trainer = EmbeddingTrainer(config, dataset=toy_data, console=Console(file=io.StringIO()))
    take, last = trainer._take_step, 2 * per_epoch
    dies = {"before mining": last - 1, "after mining": last + 1, "in the last epoch": last + 8}

    def take_step(step):
        if step.number == dies.get(stop_at):
            raise Stopped
        take(step)

    trainer._take_step = take_step
    with pytest.MonkeyPatch.context() as patch:
        if stop_at == "during mining":
            plain = negatives.write_file
            patch.setattr(negatives, "write_file", lambda path, data: (
                plain(path, data) if "0001" in path.name else (_ for _ in ()).throw(Stopped)))  # fmt: skip
        with pytest.raises(Stopped):
            trainer.train()
    (broken,) = find_runs(config.log_dir)
    EmbeddingTrainer.resume(broken.path, dataset=toy_data, console=Console(file=io.StringIO())).train()
    assert [p.read_bytes() for p in sorted((broken.path / "negatives").iterdir())] == contents
    one, two = (read_outcome(str(tmp_path / name)) for name in ("whole", "broken"))
    assert one.keys() == two.keys()
    assert one["weights"] == two["weights"]


def test_a_mined_file_that_vanished_is_not_made_up(make_config, toy_data, tmp_path):
    config = make_config(max_steps=None, num_epochs=2, remine_every=1, save_steps=5)
    trainer = EmbeddingTrainer(config, dataset=toy_data, console=Console(file=io.StringIO()))
    train_until(trainer, 17, Stopped)
    (run,) = find_runs(config.log_dir)
    assert trainer.job.schedule.steps_of_epoch[0] < 15  # the newest checkpoint lies in the second epoch
    (run.path / "negatives" / "epoch-0001.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="is gone, and the model that mined it has moved on"):
        EmbeddingTrainer.resume(run.path, dataset=toy_data, console=Console(file=io.StringIO())).train()


# ---------------------------------------------------------------- the command


def test_mine_then_train_through_the_command_line(tiny_model, tmp_path, capsys):
    file = tmp_path / "negatives.jsonl"
    data = ["--dataset-root", "sample", "--max-seq-length", "48", "--num-workers", "0"]
    mine = ["mine", str(tiny_model), *data, "--out", str(file), "--source", "both", "--depth", "20"]
    assert cli.main(mine) == 0
    said = capsys.readouterr().out
    assert (
        "a known positive" in said
        and "try --source bm25 or both" in " ".join(said.split())
        and f"--hard-negatives {file}" in said.replace("\n", "")
    )
    assert cli.main([*mine, "--json", "--per-question", "2", "--margin-relative", "none"]) == 0
    header = json.loads(capsys.readouterr().out)
    assert header == json.loads(file.read_text(encoding="utf-8").partition("\n")[0])
    report = header["report"]
    assert report["kept"] + sum(report["dropped"].values()) == report["candidates"] > 0
    assert header["settings"]["margin_relative"] is None and header["settings"]["per_question"] == 2

    train = [
        "train", "--model-name", str(tiny_model), *data, "--hard-negatives", str(file), "--max-steps", "2",
        "--eval-samples", "20", "--eval-corpus-size", "30", "--log-dir", str(tmp_path / "runs"), "--precision", "fp32",
    ]  # fmt: skip
    assert cli.main(train) == 0
    (run,) = find_runs(tmp_path / "runs")
    assert run.data["mined"]["report"] == report and run.data["hard_negatives"] > 0
    capsys.readouterr()
    assert cli.main([*train, "--seed", "7"]) == 2
    assert "mine again with the --train-split and --seed" in capsys.readouterr().err
    assert cli.main(["mine", str(run.path), "--dataset-root", "sample", "--out", str(file), "--num-workers", "0"]) == 0
    assert json.loads(file.read_text(encoding="utf-8").partition("\n")[0])["content"] == header["content"]
