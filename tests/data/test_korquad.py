"""Reading JSON: every shape KorQuAD comes in, whatever the block size; every fault named, nothing lost in silence."""

import io
import json
import random
import time
import zipfile

import pytest

from koret.data.jsonstream import JsonStream
from koret.data.korquad import UNANSWERABLE, Answer, Article, Reject, read_articles
from koret.data.sources import DataError, find_sources, natural_key


def make_page(number, **changes):
    text = f"답{number}"
    context = f'<html><p>제목 "{number}" \\ }}, {{\\"title\\" 문장 <b>{text}</b>이다.</p></html>'
    answer = {"text": text, "answer_start": context.index(text), "html_answer_start": 3, "html_answer_text": text}
    page = {
        "title": f"글 {number}",
        "url": f"https://example.org/{number}",
        "context": context,
        "raw_html": f'<p>{text} "qas": [ }}, {{"title": {"가" * number}</p>',
        "qas": [{"answer": answer, "question": f"무엇 {number}?", "id": str(number)}],
    }
    return {**page, **changes}


def write(path, data, **options):
    path.write_text(json.dumps({"version": "KorQuAD_2.1_train", "data": data}, **options), encoding="utf-8")
    return path


def split(records):
    records = list(records)
    return [r for r in records if isinstance(r, Article)], [r for r in records if isinstance(r, Reject)]


class TestShapes:
    @pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": 2}, {"separators": (",", ":")}])
    @pytest.mark.parametrize("block", [1, 97, 1 << 20])
    def test_every_layout_reads_the_same(self, tmp_path, options, block):
        pages = [make_page(number) for number in range(12)]
        path = write(tmp_path / "a.json", pages, **options)
        for strict in (False, True):
            articles, rejects = split(read_articles(path, strict=strict, block=block))
            assert not rejects
            assert [a.title for a in articles] == [p["title"] for p in pages]
            assert [a.contexts for a in articles] == [(p["context"],) for p in pages]
            assert [a.position for a in articles] == list(range(12))
            for article, page in zip(articles, pages, strict=True):
                [question], answer = article.questions, page["qas"][0]["answer"]
                assert question.answers == (Answer(answer["text"], answer["answer_start"]),)
                assert article.html and article.url == page["url"]

    def test_without_contexts_the_questions_are_the_same(self, tmp_path):
        path = write(tmp_path / "a.json", [make_page(number) for number in range(8)])
        whole, _ = split(read_articles(path))
        short, _ = split(read_articles(path, contexts=False))
        assert [a.questions for a in short] == [a.questions for a in whole]
        assert all(a.contexts == () for a in short[1:-1])

    def test_articles_that_break_the_pattern_are_read_whole(self, tmp_path):
        pages = [make_page(number) for number in range(9)]
        pages[2] = dict(reversed(pages[2].items()))  # keys in another order
        del pages[4]["raw_html"]
        pages[5]["extra"] = {"data": [{"title": "안"}]}
        pages[6]["raw_html"] = None
        articles, rejects = split(read_articles(write(tmp_path / "a.json", pages)))
        assert not rejects
        assert [a.title for a in articles] == [p["title"] for p in pages]
        assert [q.id for a in articles for q in a.questions] == [str(n) for n in range(9)]

    def test_an_article_without_questions_never_takes_those_of_the_next(self, tmp_path):
        pages = [make_page(number) for number in range(6)]
        del pages[2]["qas"]
        del pages[3]["context"]
        articles, rejects = split(read_articles(write(tmp_path / "a.json", pages)))
        assert [(a.title, len(a.questions)) for a in articles] == [
            ("글 0", 1), ("글 1", 1), ("글 2", 0), ("글 4", 1), ("글 5", 1),
        ]  # fmt: skip
        assert [(r.is_article, r.position, r.questions) for r in rejects] == [(True, 3, 1)]

    def test_an_article_written_another_way_between_two_alike_is_not_jumped_over(self, tmp_path):
        texts = [json.dumps(make_page(number), ensure_ascii=False) for number in range(7)]
        texts[2] = json.dumps(make_page(2), indent=1)
        texts[4] = texts[4].replace('"context": ', '"context":  ')
        path = tmp_path / "a.json"
        for gap in (", ", ",\n"):  # the gap before the odd one looks like the others, or does not
            path.write_text(f'{{"data": [{", ".join(texts[:2])}{gap}{", ".join(texts[2:])}]}}', encoding="utf-8")
            for contexts in (True, False):
                articles, rejects = split(read_articles(path, contexts=contexts))
                assert not rejects
                assert [q.id for a in articles for q in a.questions] == [str(n) for n in range(7)]

    def test_time_is_linear_where_one_look_alike_stands_far_behind_many_others(self, tmp_path):
        def measure(count):
            alike, odd = {}, {"separators": (", ", ":")}
            texts = [
                json.dumps(make_page(n, raw_html=""), **(alike if n in (0, 1, count - 1) else odd))
                for n in range(count)
            ]
            path = tmp_path / f"{count}.json"
            path.write_text(f'{{"data": [{", ".join(texts)}]}}', encoding="utf-8")
            started = time.process_time()
            articles, _ = split(read_articles(path, contexts=False))
            assert len(articles) == count
            return time.process_time() - started

        few, many = min(measure(1_500) for _ in range(3)), min(measure(12_000) for _ in range(2))
        assert many < 24 * few  # 8 times the articles: 8 when linear, 64 when quadratic

    def test_squad_and_a_bare_list(self, tmp_path):
        answers = [{"text": "나", "answer_start": 3}, {"text": "나다", "answer_start": 3}]
        qas = [
            {"id": 7, "question": "?", "answers": answers},
            {"id": "x", "question": "?", "answers": [], "is_impossible": True},
        ]
        data = [
            {"title": "글_하나", "paragraphs": [{"context": "가 나다", "qas": []}, {"context": "라 나다", "qas": qas}]}
        ]
        path = tmp_path / "squad.json"
        path.write_text(json.dumps({"data": data, "version": "1.1"}))
        reader = read_articles(path)
        articles, rejects = split(reader)
        assert (reader.format, reader.version) == ("SQuAD", "1.1")
        assert (
            articles[0].contexts == ("가 나다", "라 나다") and articles[0].title == "글 하나" and not articles[0].html
        )
        [question] = articles[0].questions
        assert (question.id, question.paragraph, len(question.answers)) == ("7", 1, 2)
        assert [(r.id, r.reason) for r in rejects] == [("x", UNANSWERABLE)]
        path.write_text(json.dumps(data))
        assert split(read_articles(path))[0] == articles

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ({"answer": "답1"}, (Answer("답1", -1),)),
            ({"answer": [{"text": "답1", "answer_start": 2}, {"text": "답"}]}, (Answer("답1", 2), Answer("답", -1))),
            ({"answers": [{"text": "답1", "answer_start": "3"}]}, (Answer("답1", 3),)),
            ({"answer": {"text": "답1", "answer_start": 3.0}}, (Answer("답1", 3),)),
        ],
    )
    def test_answers_in_every_form(self, tmp_path, answer, expected):
        path = write(tmp_path / "a.json", [make_page(1, qas=[{"question": "?", "id": 1, **answer}])])
        [article], _ = split(read_articles(path))
        assert article.questions[0].answers == expected

    def test_byte_order_mark(self, tmp_path):
        path = write(tmp_path / "a.json", [make_page(1)])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert len(split(read_articles(path))[0]) == 1

    def test_real_files(self, shared_data):
        reader = read_articles(shared_data / "KorQuAD_v1.0_dev.json")
        articles, rejects = split(reader)
        assert reader.format == "KorQuAD 1.0" and not rejects
        assert (len(articles), sum(len(a.contexts) for a in articles), sum(len(a.questions) for a in articles)) == (
            140, 964, 5774,
        )  # fmt: skip
        assert all(
            a.contexts[q.paragraph].startswith(answer.text, answer.start)
            for a in articles for q in a.questions for answer in q.answers
        )  # fmt: skip
        assert len(split(read_articles(shared_data / "korquad2_real_articles.json", strict=True))[0]) == 2


class TestBadRecords:
    @pytest.mark.parametrize(
        ("question", "reason"),
        [
            ({"id": "a", "answer": {"text": "답", "answer_start": 0}}, "not a valid question"),
            ({"id": "a", "question": "?", "answer": None}, "no answer"),
            ({"id": "a", "question": "?", "answer": {"text": None, "answer_start": 0}}, "not a valid question"),
            ({"id": "a", "question": "?", "answer": {"text": " ", "answer_start": 0}}, "no answer"),
            ({"id": "a", "question": " ", "answer": {"text": "답"}}, "empty question"),
            ({"id": "a", "question": 5, "answer": {"text": "답"}}, "not a valid question"),
            ("not an object", "not a valid question"),
        ],
    )
    def test_one_bad_question_costs_one_question(self, tmp_path, question, reason):
        pages = [make_page(number) for number in range(5)]
        pages[3]["qas"].append(question)
        articles, [reject] = split(read_articles(write(tmp_path / "a.json", pages)))
        assert [len(a.questions) for a in articles] == [1] * 5
        assert reject.reason.startswith(reason) and not reject.is_article and reject.position == 3
        assert reject.id == ("a" if isinstance(question, dict) else "")

    @pytest.mark.parametrize(
        "broken", ['"context": NaN', '"context": "\\ud800"', '"context": 5', '"context": {"a": [1, 2']
    )
    def test_one_bad_article_costs_one_article(self, tmp_path, broken):
        path = write(tmp_path / "a.json", [make_page(number) for number in range(4)])
        text = path.read_text()
        start = text.index('"context"', text.index("글 2".encode("unicode_escape").decode()))
        end = text.index('"raw_html"', start)
        tail = "}, " if broken.count("{") > broken.count("}") else ", "
        path.write_text(text[:start] + broken + ("]" if broken.endswith("2") else "") + tail + text[end:])
        articles, [reject] = split(read_articles(path))
        assert [a.title for a in articles][:2] == ["글 0", "글 1"] and articles[-1].title == "글 3"
        assert reject.is_article and reject.position == 2 and reject.questions == 1 and reject.article == "글 2"

    def test_deep_nesting(self, tmp_path):
        path = write(tmp_path / "a.json", [make_page(0), make_page(1), make_page(2)])
        deep = '"url": ' + "[" * 100_000 + "]" * 100_000
        path.write_text(path.read_text().replace('"url": "https://example.org/1"', deep))
        articles, [reject] = split(read_articles(path))
        assert [a.title for a in articles] == ["글 0", "글 2"] and reject.is_article

    def test_strict_finds_what_a_jump_does_not_see(self, tmp_path):
        path = write(tmp_path / "a.json", [make_page(number) for number in range(6)])
        text = path.read_text()
        text = text.replace(
            '"html_answer_start": 3, "html_answer_text": "\\ub2f54"', '"html_answer_start": 9, "html_answer_text": "x"'
        )
        text = text.replace('"title": "\\uae00 2"', '"title": "\\uae00 2", "title": "\\uae00 2"')
        path.write_text(text)
        assert not split(read_articles(path))[1]
        articles, rejects = split(read_articles(path, strict=True))
        assert {r.position: r.reason.split("'")[0] for r in rejects}.keys() == {2, 4}
        assert len(articles) == 4

    def test_strict_reads_what_stands_beside_the_articles(self, tmp_path):
        path = write(tmp_path / "a.json", [make_page(number) for number in range(3)])
        path.write_text(path.read_text().replace('"data"', '"about": {"made": [1,, 2 x]}, "data"'))
        assert len(split(read_articles(path))[0]) == 3
        with pytest.raises(DataError, match=r"a\.json is not valid JSON near byte 42"):
            list(read_articles(path, strict=True))


class TestBadFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"  \n", "is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
            (b"<!DOCTYPE html><html>404", "HTML page"),
            ('{"data": []}'.encode("utf-16"), "UTF-16"),
            ('{"data": []}'.encode("utf-16-le"), "UTF-16"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"hello", "not JSON"),
            (b'{"a": 1, "b": [2]}', "found the keys a, b"),
            (b'{"data": 5}', "found the keys data"),
            (b'{"data": []}{"data": []}', "goes on after"),
            (b'{"data": [{"title": "x", "context": "y", "qas": []} 5]}', "expected"),
            (b'{"data": [{"title": ', "cut off after 0"),
            ('{"version": "한", "data": []}'.encode("cp949"), "CP949"),
        ],
    )
    def test_is_named_with_what_to_do(self, tmp_path, content, message):
        path = tmp_path / "bad.json"
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            list(read_articles(path))
        assert "bad.json" in str(caught.value)

    @pytest.mark.parametrize("share", [0.3, 0.6, 0.95, 0.999])
    def test_truncated_says_how_far_it_got(self, tmp_path, share):
        path = write(tmp_path / "a.json", [make_page(number) for number in range(10)])
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        seen = []
        with pytest.raises(DataError, match=r"cut off after (\d+) whole articles, at byte ([\d,]+)") as caught:
            for record in read_articles(path):
                seen.append(record)
        assert f"after {len(seen)} whole" in str(caught.value)
        assert f"{int(len(content) * share):,}" in str(caught.value)

    def test_a_byte_of_another_encoding_is_placed(self, tmp_path):
        path = write(tmp_path / "a.json", [make_page(number) for number in range(5)], ensure_ascii=False)
        content = path.read_bytes()
        at = content.index("글 3".encode())
        path.write_bytes(content[:at] + "글".encode("cp949") + content[at + 3 :])
        with pytest.raises(DataError, match=f"byte {at:,}"):
            list(read_articles(path))

    def test_random_damage_never_crashes(self, tmp_path):
        path = write(tmp_path / "a.json", [make_page(number) for number in range(6)])
        content = path.read_bytes()
        rng = random.Random(0)
        for _ in range(150):
            damaged = bytearray(content)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(damaged))
                damaged[at : at + rng.randint(0, 3)] = rng.choice([b"", b'"', b"\\", b"{", b"]", b"\xff", b",", b"\0"])
            path.write_bytes(damaged)
            try:
                articles, rejects = split(read_articles(path))
            except DataError as error:
                assert "a.json" in str(error)
            else:
                assert len(articles) + sum(r.is_article for r in rejects) >= 1


class TestStream:
    @pytest.mark.parametrize("block", [1, 2, 3, 64])
    def test_values_end_where_a_parser_says(self, block):
        for value in ['{"a": "}\\"\\\\", "b": [1, {"c": []}]}', '"\\\\"', '"a\\"b"', "-12.5e3", "true", "[]", '["]"]']:
            stream = JsonStream(io.BytesIO((f"[{value}]").encode()), "x", block)
            end = stream.skip_value(1)
            assert json.loads(bytes(stream.buffer[1:end])) == json.loads(value)


class TestSources:
    def test_natural_order(self):
        names = ["b_10.json", "b_2.json", "a/x.json", "b_1.json"]
        assert sorted(names, key=natural_key) == ["a/x.json", "b_1.json", "b_2.json", "b_10.json"]

    def test_folders_zips_and_what_is_ignored(self, tmp_path):
        for number in (2, 10, 1):
            folder = tmp_path / f"KorQuAD_2.1_train_{number:02d}"
            folder.mkdir()
            write(folder / f"korquad2.1_train_{number}.json", [make_page(number)])
        (tmp_path / "readme.pdf").write_bytes(b"x")
        (tmp_path / "config.json").write_text('{"lr": 1}')
        (tmp_path / ".hidden.json").write_text("{")
        with zipfile.ZipFile(tmp_path / "KorQuAD_2.1_dev_00.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__MACOSX/._a.json", "x")
            archive.writestr("dev/", "")
            archive.writestr("dev/._a.json", "x")
            archive.writestr("dev/a.json", json.dumps({"data": [make_page(5)]}))
            archive.writestr("dev/notes.txt", "x")
            twin = tmp_path / "KorQuAD_2.1_train_01" / "korquad2.1_train_1.json"
            archive.write(twin, twin.name)
        sources, ignored = find_sources(tmp_path)
        assert [source.name for source in sources] == [
            "KorQuAD_2.1_dev_00.zip!dev/a.json",
            "KorQuAD_2.1_train_01/korquad2.1_train_1.json",
            "KorQuAD_2.1_train_02/korquad2.1_train_2.json",
            "KorQuAD_2.1_train_10/korquad2.1_train_10.json",
        ]
        reasons = dict(ignored)
        assert reasons["config.json"] == "JSON without articles" and "readme.pdf" in reasons
        assert "also unpacked" in reasons["KorQuAD_2.1_dev_00.zip!korquad2.1_train_1.json"]
        assert [a.title for source in sources for a in read_articles(source)] == ["글 5", "글 1", "글 2", "글 10"]

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    def test_a_zip_reads_as_its_file(self, tmp_path, method):
        path = write(tmp_path / "a.json", [make_page(number) for number in range(40)])
        with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
            archive.write(path, "deep/a.json")
        packed, plain = list(read_articles(tmp_path / "a.zip")), list(read_articles(path))
        assert [(a.title, a.contexts, a.questions) for a in packed] == [
            (a.title, a.contexts, a.questions) for a in plain
        ]

    def test_damaged_and_encrypted_zips(self, tmp_path):
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.json", json.dumps({"data": [make_page(number) for number in range(40)]}))
        content = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            crc = archive.infolist()[0].CRC.to_bytes(4, "little")
        path.write_bytes(content.replace(crc, b"\1\2\3\4"))
        with pytest.raises(DataError, match=r"a\.zip!a\.json.*CRC"):
            list(read_articles(path))
        path.write_bytes(content[:60] + bytes(60) + content[120:])
        with pytest.raises(DataError, match=r"a\.zip"):
            list(read_articles(path))
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=r"no readable zip"):
            find_sources(path)
        locked = bytearray(content)
        locked[locked.rindex(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(locked)
        with pytest.raises(DataError, match="encrypted"):
            find_sources(path)

    def test_a_zip_bomb_is_refused_unread(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("a.json", "w") as member:
                for _ in range(300):
                    member.write(b" " * (1 << 20))
        with pytest.raises(DataError, match="fold"):
            find_sources(tmp_path / "bomb.zip")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            find_sources(tmp_path / "none")
        with pytest.raises(DataError, match="holds no data file"):
            find_sources(tmp_path)
