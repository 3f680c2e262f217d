"""The data of a run is read as its settings say."""

import json

import pytest

from koret.config import TrainingConfig
from koret.data.sources import DataError
from koret.training.preparation import load_data


class NoTokenizer:
    """An encoder as far as reading data needs one: tokens are estimated."""

    def export_tokenizer(self, folder):
        return None


@pytest.fixture
def pages(tmp_path):
    """Forty articles in one file, twelve with an answer that is not there."""
    lines = "".join(f"<p>이것은 {number}번째 문장이다.</p>" for number in range(40))
    data = []
    for number in range(40):
        answer = {"text": "없는 답", "answer_start": 3} if number < 12 else {"text": "이것", "answer_start": 3}
        question = {"id": str(number), "question": f"{number}번 글은?", "answer": answer}
        data.append({"title": f"글 {number}", "context": lines, "qas": [question]})
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": data}), encoding="utf-8")
    return path


def read(pages, **settings):
    config = TrainingConfig(
        dataset_root=str(pages), cache_dir=str(pages.parent), max_seq_length=64, num_workers=0, **settings
    )
    return load_data(config, NoTokenizer(), progress=False)


def test_the_share_of_bad_records_is_a_setting(pages):
    with pytest.raises(DataError, match="12 of 40 records"):
        read(pages)
    assert read(pages, max_bad=0.3).questions.num_rows == 28
    with pytest.raises(ValueError, match="max_bad"):
        read(pages, max_bad=1.5)


def test_passages_overlap_when_asked(pages):
    plain, doubled = (read(pages, max_bad=0.3, passage_overlap=share).passages for share in (0.0, 0.3))
    assert doubled.num_rows > plain.num_rows
    starts, ends = doubled.column("start").to_pylist(), doubled.column("end").to_pylist()
    assert starts[1] < ends[0]
    with pytest.raises(ValueError, match="passage_overlap"):
        read(pages, passage_overlap=0.5)
