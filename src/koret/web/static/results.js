// Rankings side by side: cards, marked words, and lines between the places of one passage.

import { draw, make } from "./elements.js";
import { count, say } from "./words.js";

export function renderResults(target, answer, columns, showGold) {
  const shown = answer.columns.map((column) => ({ ...columns.find((c) => c.id === column.id), ...column }));
  const board = make("div", { class: "board", "data-columns": shown.length });
  const lines = draw("svg", { class: "lines", "aria-hidden": "true" });
  board.append(lines);
  const words = splitWords(answer.query);
  shown.forEach((column, place) => board.append(renderColumn(column, describe(column, columns), shown[place - 1], answer.passages, words)));
  target.replaceChildren(...[showGold && answer.known ? renderGold(answer, shown) : null, board].filter(Boolean));
  const redraw = () => drawLines(board, lines, shown, answer.passages);
  redraw();
  new ResizeObserver(redraw).observe(board);
  for (const [enter, leave] of [["pointerover", "pointerleave"], ["focusin", "focusout"]]) {
    board.addEventListener(enter, (event) => highlight(board, event.target.closest?.(".card")?.dataset.passage));
    board.addEventListener(leave, () => highlight(board, null));
  }
  board.addEventListener("keydown", (event) => moveAmongCards(board, event));
}

export const columnName = (column) => (column.kind === "model" ? column.name : say(column.kind));

function renderGold(answer, shown) {
  const ranks = shown.map((column) =>
    make("li", { class: `kind-${column.kind}` }, make("span", { class: "dot" }), columnName(column), " ",
      make("strong", {}, column.gold_rank ? say("rank_n", { rank: column.gold_rank }) : say("beyond", { depth: column.depth }))));
  const parts = [make("p", {}, make("span", { class: "soft" }, say("gold_ranks"))), make("ol", {}, ranks)];
  if (answer.answers.length) {
    parts.push(make("p", { class: "answers" }, make("span", { class: "soft" }, `${say("answer")} `), answer.answers[0]));
  }
  return make("div", { class: "goldline" }, parts);
}

function describe(column, columns) {
  if (column.kind === "bm25") return say("about_bm25");
  if (column.kind === "hybrid" && columns.some((one) => one.kind === "tuned")) return say("about_hybrid");
  return column.kind === "model" ? "" : column.name;
}

function renderColumn(column, about, before, passages, words) {
  const head = make("header", {},
    make("h2", {}, make("span", { class: "dot" }), columnName(column)),
    make("span", { class: "soft about", title: column.name }, about),
    make("span", { class: "soft ms", title: say("ms_title") }, say("ms", { ms: Math.max(1, Math.round(column.milliseconds)) })));
  const best = column.hits[0]?.score ?? 0;
  const cards = column.hits.map((hit) => renderCard(hit, passages[hit.passage], column, before, words, best));
  const body = cards.length ? make("ol", { class: "cards" }, cards) : make("p", { class: "soft none" }, say("nothing"));
  return make("section", { class: `column kind-${column.kind}`, "data-column": column.id, "aria-label": columnName(column) }, head, body);
}

function renderCard(hit, passage, column, before, words, best) {
  const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("i"));
  const span = best - column.lowest;
  bar.firstChild.style.width = `${Math.round(100 * (span > 0 ? Math.max(0.04, (hit.score - column.lowest) / span) : 1))}%`;
  const text = make("p", { class: "text" }, ...markWords(passage.text.replace(/\n{2,}/g, "\n"), words));
  const card = make("li", {
    class: `card${passage.gold ? " gold" : ""}`, tabindex: "-1", "data-passage": hit.passage, "data-rank": hit.rank,
    onclick: (event) => { if (!String(getSelection())) toggle(event.currentTarget); },
  },
  make("div", { class: "cardtop" }, make("span", { class: "rank" }, String(hit.rank)),
    renderHeading(passage.heading, words),
    passage.gold ? make("span", { class: "badge" }, say("gold")) : null),
  text,
  make("div", { class: "cardfoot" }, bar,
    make("span", { class: "score", title: say("score", { score: hit.score }) }, formatScore(hit.score)),
    before ? renderMove(hit, passage, before) : null));
  return card;
}

function renderHeading(heading, words) {
  const [title, ...sections] = heading.split(" > ");
  return make("p", { class: "heading" }, make("strong", {}, ...markWords(title, words)),
    sections.length ? make("span", { class: "soft" }, ` › ${sections.join(" › ")}`) : null);
}

function renderMove(hit, passage, before) {
  const rank = passage.ranks[before.id];
  const other = columnName(before);
  if (!rank) return make("span", { class: "move fresh", title: say("fresh", { other, depth: before.depth }) }, "＋");
  const by = rank - hit.rank;
  if (!by) return make("span", { class: "move", title: say("same", { other }) }, "＝");
  const name = by > 0 ? "up" : "down";
  return make("span", { class: `move ${name}`, title: say(name, { other, by: Math.abs(by) }) }, `${by > 0 ? "▲" : "▼"}${Math.abs(by)}`);
}

const formatScore = (score) => (Math.abs(score) >= 10 ? score.toFixed(1) : score.toFixed(3));

function toggle(card) {
  card.classList.toggle("open");
}

// ---- words that question and passage share

// Korean words end in particles: a word's beginning counts, two characters of it at least and half of it.
export function splitWords(query) {
  const words = query.normalize("NFC").toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const stems = new Set();
  for (const word of words) {
    const letters = [...word];
    if (letters.length < 2) continue;
    for (let length = letters.length; length >= Math.max(2, Math.ceil(letters.length / 2)); length--) {
      stems.add(letters.slice(0, length).join(""));
    }
  }
  return [...stems].sort((a, b) => b.length - a.length);
}

export function markWords(text, stems) {
  if (!stems.length) return [text];
  const pattern = new RegExp(`(?<![\\p{L}\\p{N}])(?:${stems.map((s) => s.replace(/[^\p{L}\p{N}]/gu, "")).join("|")})`, "giu");
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(pattern)) {
    parts.push(text.slice(end, found.index), make("mark", {}, found[0]));
    end = found.index + found[0].length;
  }
  parts.push(text.slice(end));
  return parts;
}

// ---- lines between columns

function drawLines(board, lines, shown, passages) {
  const frame = board.getBoundingClientRect();
  lines.setAttribute("width", board.scrollWidth);
  lines.setAttribute("height", board.scrollHeight);
  lines.replaceChildren();
  const columns = [...board.querySelectorAll(".column")];
  for (let place = 1; place < columns.length; place++) {
    for (const hit of shown[place].hits) {
      const [from, to] = [columns[place - 1], columns[place]].map((c) => c.querySelector(`[data-passage="${hit.passage}"]`));
      if (!from || !to) continue;
      const [a, b] = [from.getBoundingClientRect(), to.getBoundingClientRect()];
      const [x1, x2] = [a.right - frame.left, b.left - frame.left];
      const [y1, y2] = [a, b].map((box) => box.top - frame.top + 22);
      const bend = (x2 - x1) / 2;
      const gain = Number(from.dataset.rank) - Number(to.dataset.rank);
      const kind = passages[hit.passage].gold ? "gold" : gain > 0 ? "up" : gain < 0 ? "down" : "same";
      lines.append(draw("path", {
        class: kind, "data-passage": hit.passage,
        d: `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`,
      }));
    }
  }
}

function highlight(board, passage) {
  board.classList.toggle("picking", Boolean(passage));
  for (const one of board.querySelectorAll("[data-passage]")) one.classList.toggle("picked", one.dataset.passage === passage);
}

function moveAmongCards(board, event) {
  const card = document.activeElement?.closest?.(".card");
  if (!card) return;
  if (event.key === "Enter" || event.key === " ") {
    toggle(card);
    event.preventDefault();
    return;
  }
  const columns = [...board.querySelectorAll(".column")].filter((column) => column.querySelector(".card"));
  const x = columns.findIndex((column) => column.contains(card));
  const cards = (column) => [...column.querySelectorAll(".card")];
  const y = cards(columns[x]).indexOf(card);
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
  if (!dx && !dy) return;
  event.preventDefault();
  const column = columns[x + dx];
  const next = column && cards(column)[Math.min(y + dy, cards(column).length - 1)];
  if (next) {
    next.focus();
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
  } else if (dy < 0) {
    document.getElementById("query").focus();
  }
}

export const describeCorpus = (corpus) => say("corpus", { name: corpus.name, count: count(corpus.passages) });
