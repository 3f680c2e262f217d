"""Passages: budgets kept, nothing lost, gold found."""

import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from koret.data.passages import (
    RESERVED_TOKENS,
    Passage,
    estimate_tokens,
    find_gold,
    join_heading,
    make_token_counter,
    split_article,
)

PAGE = """한라산은 제주도에 있는 산이다. 높이는 1,947m이다.

위치 | 제주특별자치도
높이 | 1,947m

## 지형

화산섬의 한가운데에 솟아 있다.

### 백록담

꼭대기의 호수이다.

## 역사

시기 | 이름 | 비고
1970년 | 국립공원 | 지정
2007년 | 세계유산 | 등재
2010년 | 지질공원 | 인증

## 같이 보기

- 오름
- 영실"""


def count_words(texts):
    return [len(text.split()) for text in texts]


def split(text, budget, overlap=0.0, html=True, title="한라산", count=count_words):
    return split_article(title, text, html=html, budget=budget, count_tokens=count, overlap=overlap)


def random_page(rng):
    words = ["산", "강물이", "바다에서", "도시.", "나라이다.", "1945년", "(한글)", "세종대왕의", "가" * 40, "끝?"]
    lines = []
    for _ in range(rng.randrange(1, 30)):
        kind = rng.random()
        if kind < 0.25:
            lines.append("#" * rng.randrange(2, 6) + " " + " ".join(rng.choices(words, k=rng.randrange(1, 8))))
        elif kind < 0.4:
            columns = rng.randrange(2, 5)
            for _ in range(rng.randrange(1, 6)):
                lines.append(" | ".join(rng.choice(words) for _ in range(columns)))
        elif kind < 0.5:
            lines += ["- " + " ".join(rng.choices(words, k=rng.randrange(1, 5))) for _ in range(3)]
        else:
            lines.append(" ".join(rng.choices(words, k=rng.randrange(1, 90))))
        if rng.random() < 0.8:
            lines.append("")
    return "\n".join(lines)


@pytest.mark.parametrize("overlap", [0.0, 0.2])
@pytest.mark.parametrize("html", [True, False])
def test_random_pages_lose_nothing_and_keep_the_budget(html, overlap):
    def count_characters(texts):  # harsher than words: long words must be cut, too
        return [len(re.sub(r"\s", "", text)) for text in texts]

    rng = random.Random(7)
    for case in range(150):
        text = random_page(rng)
        budget = rng.choice([16, 24, 40, 64, 128])
        passages = split(text, budget, overlap, html, count=count_characters)
        covered = [False] * len(text)
        for p in passages:
            assert not text[p.start].isspace() and not text[p.end - 1].isspace()
            covered[p.start : p.end] = [True] * (p.end - p.start)
            total = count_characters([join_heading(p.heading, p.text)])[0]
            assert p.tokens + RESERVED_TOKENS <= budget, (case, p)
            assert total <= p.tokens + 6, (case, p)  # separators are counted apart, heading marks may be counted
            assert p.text.endswith(re.sub(r"(?m)^#{2,6} +(?=\S)", "", text[p.start : p.end]) if html else p.text)
        starts = [p.start for p in passages]
        assert starts == sorted(set(starts))
        position = 0
        for line in text.split("\n"):
            for i, c in enumerate(line, position):
                if c.isspace() or covered[i]:
                    continue
                assert html and line.startswith("##"), (case, line)
                name = line.lstrip("#").strip()
                assert any(name in p.heading.split(" > ") for p in passages if p.start > i), (case, line)
                break
            position += len(line) + 1


def test_whole_page_without_a_budget():
    (passage,) = split(PAGE, None)
    assert (passage.heading, passage.start, passage.end) == ("한라산", 0, len(PAGE))
    assert passage.text == PAGE.replace("### ", "").replace("## ", "")


def test_sections_start_passages_and_give_their_path():
    page = PAGE.replace("\n2010년 | 지질공원 | 인증", "")
    passages = split(page, 29)  # room for 20 words under the title
    assert [p.heading for p in passages] == ["한라산", "한라산 > 지형", "한라산 > 역사", "한라산 > 같이 보기"]
    assert passages[1].text.split("\n") == ["화산섬의 한가운데에 솟아 있다.", "", "백록담", "", "꼭대기의 호수이다."]
    assert page[passages[1].start : passages[1].end].startswith("화산섬의")
    assert passages[3].text == "- 오름\n- 영실"


def test_cut_table_repeats_its_header_outside_the_span():
    table = "\n".join(["시기 | 이름 | 비고"] + [f"{year}년 | 행사 | 개최" for year in range(2001, 2011)])
    passages = split(table, 36)  # room for 27 words, a row has 5
    assert [p.text.count("\n") + 1 for p in passages] == [5, 5, 3]
    for p, first in zip(passages, [0, 2005, 2009], strict=True):
        assert p.text.startswith("시기 | 이름 | 비고\n2" if not first else f"시기 | 이름 | 비고\n{first}년")
        assert table[p.start : p.end].startswith("시기" if not first else f"{first}년")


def test_two_column_rows_repeat_no_header():
    text = "\n".join(f"항목{i} | 값 이 깁 니 다" for i in range(10))
    passages = split(text, 24)
    assert len(passages) > 1
    assert not any("항목0" in p.text for p in passages[1:])


def test_plain_paragraph_whole_and_cut():
    text = "첫 문장이다. 둘째 문장은 조금 더 길다. " * 10
    assert split(text, None, html=False) == [Passage("", text, 0, len(text), 70)]
    passages = split(text, 18, html=False)
    assert all(p.heading == "" and p.text == text[p.start : p.end] and p.text.endswith(".") for p in passages)
    assert split(" \n", None, html=False) == split(" \n", 64) == []


def test_overlap_repeats_the_last_sentence():
    text = " ".join(f"이것은 {i}째 문장이다." for i in range(12))
    passages = split(text, 21, overlap=0.2)  # 12 words of room, sentences of 3
    assert [p.text for p in passages[:2]] == [
        " ".join(f"이것은 {i}째 문장이다." for i in range(4)),
        " ".join(f"이것은 {i}째 문장이다." for i in range(3, 7)),
    ]


def test_long_titles_and_headings_leave_room_for_text():
    text = "## " + "긴 제목 " * 30 + "\n\n본문 한 줄.\n\n## 짧은 절\n\n본문 두 줄."
    passages = split(text, 32, title="아주 긴 이름 " * 20)
    assert all(p.tokens + RESERVED_TOKENS <= 32 for p in passages)
    assert passages[0].text.startswith("긴 제목") and "본문 두 줄." in passages[-1].text


def test_empty_sections_stay_in_the_text():
    text = "## 가\n\n### 나\n\n## 다\n\n글.\n\n## 라"
    passages = split(text, 64)
    assert [(p.heading, p.text) for p in passages] == [("한라산 > 가", "나\n\n다\n\n글.\n\n라")]


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="budget of 8 tokens"):
        split(PAGE, 8)
    for overlap in (0.5, -0.1):
        with pytest.raises(ValueError, match="overlap"):
            split(PAGE, 64, overlap)


def test_gold_is_every_overlap_and_the_largest_is_best():
    passages = [Passage("", "", a, b, 0) for a, b in [(0, 10), (10, 20), (25, 40)]]
    assert find_gold(passages, [(3, 5)]) == ([0], 0)
    assert find_gold(passages, [(8, 14)]) == ([0, 1], 1)
    assert find_gold(passages, [(8, 12)]) == ([0, 1], 0)
    assert find_gold(passages, [(3, 5), (26, 30)]) == ([0, 2], 2)
    assert find_gold(passages, [(21, 24)]) == ([2], 2)  # a heading line: the passage below it
    assert find_gold(passages, [(41, 44)]) == ([2], 2)
    assert find_gold([], [(0, 1)]) == ([], -1)


def test_answer_that_is_a_heading_gets_its_section():
    passages = split(PAGE, 29)
    at = PAGE.index("지형")
    assert find_gold(passages, [(at, at + 2)]) == ([1], 1)


def test_tokenizer_counts_equal_the_library(tmp_path: Path):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator([PAGE], trainer)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.no_truncation()
    count = make_token_counter(tmp_path / "tokenizer.json")
    texts = [PAGE, "백록담", ""]
    assert count(texts) == [len(tokenizer.encode(t, add_special_tokens=False).ids) for t in texts]
    for p in split(PAGE, 48, count=count):
        assert count([join_heading(p.heading, p.text)])[0] <= p.tokens <= 48 - RESERVED_TOKENS


def test_bad_tokenizer_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing.json"):
        make_token_counter(tmp_path / "nothing.json")


def test_estimate_grows_with_length():
    assert estimate_tokens(["", "가", "가나다라"]) == [0, 1, 2]
