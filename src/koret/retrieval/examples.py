"""Three worked examples of E5KorQuADInference: one query, a batch, similarities."""

from __future__ import annotations

from collections.abc import Callable

from koret.retrieval.inference import E5KorQuADInference

PASSAGES = [
    "훈민정음은 세종이 1443년에 창제하여 1446년에 반포한 우리나라 고유의 문자이다.",
    "거북선은 임진왜란 때 이순신이 이끈 조선 수군이 사용한 돌격용 군함이다.",
    "한라산은 제주도 한가운데에 솟은 화산으로, 남한에서 가장 높은 산이다.",
    "김치는 배추나 무를 소금에 절인 뒤 양념에 버무려 발효시킨 음식이다.",
    "한강은 태백산맥에서 시작하여 서울을 지나 황해로 흘러드는 강이다.",
    "첨성대는 신라 선덕여왕 때 경주에 세워진 천문 관측 시설로 알려져 있다.",
]
QUERIES = ["한글을 만든 임금은 누구인가?", "남한에서 가장 높은 산은 어디인가?", "서울을 가로지르는 강의 이름은?"]


def run_examples(model_path: str, say: Callable[[str], None]) -> None:
    """Run the three examples with a model, telling ``say`` every line."""
    model = E5KorQuADInference(model_path)
    say(f"model: {model.encoder.name} ({model.dimensions} dimensions, {model.encoder.device})\n")

    say("1. One query: model.search(query, passages, top_k=3)")
    say(f"   {QUERIES[0]}")
    for hit in model.search(QUERIES[0], PASSAGES, top_k=3):
        say(f"   {hit['rank']}. {hit['score']:.4f}  {hit['passage']}")

    say("\n2. A batch: model.batch_search(queries, passages, top_k=1)")
    for query, hits in zip(QUERIES, model.batch_search(QUERIES, PASSAGES, top_k=1), strict=True):
        say(f"   {query}\n   -> {hits[0]['score']:.4f}  {hits[0]['passage']}")

    say("\n3. Similarities: model.compute_similarity(model.encode_query(q), model.encode_passages(passages))")
    scores = model.compute_similarity(model.encode_query(QUERIES[1]), model.encode_passages(PASSAGES))
    say(f"   {QUERIES[1]}")
    for score, passage in zip(scores, PASSAGES, strict=True):
        say(f"   {score:.4f}  {passage}")
