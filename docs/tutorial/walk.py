# %% [markdown]
# # From raw data to a served model
#
# This page is [walk.py](walk.py), run from the first cell to the last by `python tools/tutorial.py`; below each cell
# stands what it printed, and how long it took. Open walk.py in an editor that knows `# %%` cells, or run it as it is:
# it needs no network, writes into the directory it is started in, and stays far below 15 minutes on two cores.
#
# The model at hand is the offline base, an English one that has to learn Korean from some hundred questions. Expect
# it to become much better than it was and to stay behind BM25. On a machine that reaches the hub, put
# `intfloat/multilingual-e5-small` and your own data in its place; nothing else changes.

# %%
import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from importlib.resources import files
from pathlib import Path

from koret import EmbeddingTrainer, TrainingConfig, build_index, clean_html_text, cli, load_dataset, open_index
from koret.data.pairs import assert_no_leak, split_articles
from koret.data.statistics import compute_statistics

# %% [markdown]
# ## 1. Raw data
#
# KorQuAD 2.1 is JSON: an article is a Wikipedia page as HTML, with questions whose answers point into that HTML. The
# embedded sample has the same form.

# %%
source = files("koret") / "data" / "sample" / "korquad2.1_sample.json"
articles = json.loads(source.read_text(encoding="utf-8"))["data"]
article = articles[0]
print(f"{len(articles)} articles; the first is {article['title']} with {len(article['qas'])} questions")
print("HTML: ", article["context"][:150].replace("\n", " "))
print("text: ", clean_html_text(article["context"])[:100].replace("\n", " "))
question = article["qas"][0]
print("asked:", question["question"], "->", question["answer"]["text"], "at", question["answer"]["answer_start"])

# %% [markdown]
# ## 2. Prepared, and looked at
#
# Loading cleans every page, carries the answers' places along, cuts passages, and notes which passages hold each
# answer. What could not be read would be listed with its reason.

# %%
data = load_dataset("sample", num_workers=0)
statistics = compute_statistics(data)
print(f"{len(data.articles)} articles, {len(data.passages)} passages, {len(data.questions)} questions")
print(json.dumps({key: statistics[key] for key in ("question_types", "answer_kinds") if key in statistics}, indent=1))

# %% [markdown]
# ## 3. Split by article
#
# A row-wise split would put questions about one paragraph on both sides. koret splits by article and keeps articles
# together that share a passage or a question.

# %%
train, held_out = split_articles(data, train_split=0.8, seed=42)
assert_no_leak(data, train, held_out)
print(f"{len(train)} articles to train on, {len(held_out)} held out, nothing shared")

# %% [markdown]
# ## 4. A short LoRA training
#
# The trainer scores the base on the held-out questions before the first step, trains, and scores the merged model as
# it was saved. All of it lands in one run directory.

# %%
config = TrainingConfig(
    model_name="offline",
    dataset_root="sample",
    train_split=0.8,
    max_seq_length=96,
    batch_size=32,
    max_steps=24,
    learning_rate=2e-3,
    warmup_steps=4,
    eval_samples=150,
    eval_corpus_size=1,
    log_every_n_steps=6,
    save_steps=1000,
    num_workers=0,
)
run = EmbeddingTrainer(config).train()

# %% [markdown]
# ## 5. Is it better?
#
# The verdict compares the same questions before and after and resamples whole articles. It is stored in the run and
# printed in the model card.

# %%
for name, scores in (("base", run.base), ("tuned", run.final)):
    print(f"{name:<6}", "  ".join(f"{metric} {scores[metric]:.3f}" for metric in ("ndcg@10", "recall@10", "mrr@10")))
print(run.verdict["sentence"])
print("BM25:", run.verdict["against_bm25"]["sentence"])

# %% [markdown]
# ## 6. Question by question
#
# An average hides who paid for it. Compare shows the largest moves in both directions.

# %%
cli.main(["compare", "offline", str(run.path), "--dataset-root", "sample", "--max-queries", "60", "--moves", "2"])

# %% [markdown]
# ## 7. An index on disk
#
# Every passage becomes one vector, kept together with its text, its words for BM25, and the fingerprint of the model:
# searching with another one is refused.

# %%
with closing(build_index(run.path, "sample", "index")) as index:
    print(f"{index.report.encoded} passages of {index.report.added} articles")

# %% [markdown]
# ## 8. Search
#
# By vectors, by words, or by both, ranks fused.

# %%
with closing(open_index("index")) as index:
    for mode in ("dense", "lexical", "hybrid"):
        print(mode)
        (hits,) = index.search(["한글을 만든 임금은 누구인가?"], k=2, mode=mode)
        for hit in hits:
            print(f"  {hit.rank}  {hit.score:.3f}  {hit.entry.text[:70]}".replace("\n", " "))

# %% [markdown]
# ## 9. Serve it
#
# `koret web` puts answers side by side; here those of the index just made. The page is for people; the same answers
# come as JSON. (`koret web offline latest` would show base and tuned model next to each other.)

# %%
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
page = f"http://127.0.0.1:{port}"
command = [sys.executable, "-m", "koret.cli", "web", "--index", "index", "--port", str(port)]
server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def fetch(path, body=None):
    """The JSON behind an address of the page."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(page + path, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


for _ in range(240):
    try:
        state = fetch("/api/state")
        break
    except OSError:
        if server.poll() is not None:
            raise RuntimeError(server.stdout.read()) from None
        time.sleep(0.5)
else:
    raise RuntimeError("the page did not start in two minutes")
print("columns:", ", ".join(column["name"] for column in state["columns"]))

# %%
columns = [column["id"] for column in state["columns"]]
answer = fetch("/api/search", {"query": "남한에서 가장 높은 산은 어디인가?", "columns": columns, "k": 2})
print(json.dumps(answer, ensure_ascii=False)[:900])
server.terminate()
assert server.wait(30) is not None

# %% [markdown]
# ## What is left
#
# The run's `model/` directory is a plain sentence-transformers model, so everything that reads those can serve it:
# [deploying](../guides/deploying.md). What each number of the report means: [the report](../guides/report.md). Why
# any of this works, and what to try next: [the learning guide](../ADVANCED.md).

# %%
print(sorted(path.name for path in Path(run.path / "model").iterdir()))
