"""Fixtures of the evaluation tests."""

from __future__ import annotations

import pytest
from evaluation_examples import HashEncoder, make_dataset

MOUNTAINS = ["한라산", "백두산", "지리산", "설악산", "북한산", "금강산", "태백산", "소백산", "오대산", "월악산"]
PLACES = ["제주도", "함경도", "경상도", "강원도", "서울", "회양군", "태백시", "영주시", "평창군", "제천시"]


@pytest.fixture
def encoder():
    return HashEncoder()


@pytest.fixture
def weak_encoder():
    return HashEncoder("weak", dimensions=12, noise=0.5)


@pytest.fixture
def dataset():
    """Ten articles of three paragraphs and three questions each, with the faults of real data mixed in."""
    articles = []
    for i, (mountain, place) in enumerate(zip(MOUNTAINS, PLACES, strict=True)):
        height = f"{1500 + 37 * i}미터"
        paragraphs = [
            f"{mountain}은 {place}에 있는 산이다. 해발 고도는 {height}이며 많은 사람이 찾는다.",
            f"{mountain} 정상에는 오래된 사찰이 있고 봄에는 진달래가 핀다. 절의 이름은 {mountain[:2]}사이다.",
            f"{place} 사람들은 {mountain}에서 가을마다 축제를 연다. 축제에는 {100 + i}명이 모인다.",
        ]
        questions = [
            (f"{mountain}의 높이는 얼마인가?", height, 0),
            (f"{place}의 산 꼭대기에 있는 절의 이름은 무엇인가?", f"{mountain[:2]}사", 1),
            (f"{place} 주민이 가을에 여는 행사에는 몇 명이 오는가?", f"{100 + i}명", 2),
        ]
        articles.append((mountain, paragraphs, questions))
    articles[1][1].append(articles[0][1][0])  # a duplicate passage in another article
    articles[2][2].append(("한라산의 높이는 얼마인가?", "1500미터", 0))  # a repeated question
    articles[3][2].append(("답이 없는 질문은 무엇인가?", "", None))
    articles[4][2].append((" ", "서울", 0))
    return make_dataset(articles)
