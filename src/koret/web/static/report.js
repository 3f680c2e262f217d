// The run's report: verdict, scores with intervals, wins and losses, slices, curves.

import { drawCurve, drawIntervals } from "./charts.js";
import { make } from "./elements.js";
import { count, say, sayLabel } from "./words.js";

const METRICS = [["ndcg@10", "nDCG@10"], ["map", "MAP"], ["mrr@10", "MRR@10"], ["recall@10", "recall@10"]];
const PAGE = 20;
const short = (value) => value.toFixed(3).replace(/^(-?)0\./, "$1.");
const signed = (value) => (value < 0 ? "−" : "+") + short(Math.abs(value));

export function renderReport(target, report, fetchQuestions, ask) {
  target.replaceChildren(
    renderVerdict(report), renderScores(report), renderQuestions(report, fetchQuestions, ask),
    renderSlices(report), renderCurves(report));
}

export function renderNoReport(target) {
  target.replaceChildren(make("div", { class: "empty" }, make("h2", {}, say("no_report_title")), make("p", { class: "soft" }, say("no_report"))));
}

function renderVerdict(report) {
  const { verdict, against_bm25: lexical, task, clean } = report;
  const figures = (v) => say("figures", { a: short(v.base), b: short(v.tuned), gap: signed(v.difference), low: signed(v.low), high: signed(v.high) });
  const words = clean === true ? "clean" : clean === false ? "not_clean" : "clean_unknown";
  return make("div", { class: `verdict ${verdict ? verdict.verdict.split(" ")[0] : "none"}` },
    make("h1", {}, say(verdict ? `verdict_${verdict.verdict}` : "verdict_none")),
    verdict ? make("p", { class: "figures" }, figures(verdict)) : null,
    lexical ? make("p", {}, make("strong", {}, say(`lexical_${lexical.verdict}`)), " · ", figures(lexical)) : null,
    make("p", { class: "soft" }, `${say("asked", { queries: count(task.queries), groups: count(task.groups), corpus: count(task.corpus) })} · ${report.run} · ${report.data.source}`),
    make("p", { class: "soft" }, say(words)));
}

const kindOf = (role) => ({ base: "base", model: "tuned", lexical: "bm25", fusion: "hybrid" })[role];
const nameOf = (row) => (row.role === "lexical" ? row.system : say(kindOf(row.role)));

function renderScores(report) {
  const rows = report.systems.map((row) => make("tr", { class: `kind-${kindOf(row.role)}` },
    make("th", { scope: "row" }, make("span", { class: "dot" }), nameOf(row)),
    METRICS.map(([key]) => {
      const value = row.metrics[key];
      return make("td", {}, value ? [short(value.mean), make("small", {}, ` ${short(value.low)}–${short(value.high)}`)] : "");
    })));
  if (Object.keys(report.differences).length) {
    rows.push(make("tr", { class: "gap" }, make("th", { scope: "row" }, say("difference")), METRICS.map(([key]) => {
      const gap = report.differences[key];
      return make("td", { class: gap?.outcome.split(" ")[0] }, gap ? [signed(gap.mean), make("small", {}, ` ${signed(gap.low)}…${signed(gap.high)}`)] : "");
    })));
  }
  const head = make("tr", {}, make("td"), METRICS.map(([, label]) => make("th", { scope: "col" }, label)));
  return make("section", { class: "part" }, make("h2", {}, say("scores")),
    drawIntervals(report.systems.map((row) => ({ kind: kindOf(row.role), name: nameOf(row), metrics: row.metrics })), METRICS),
    make("div", { class: "wide", tabindex: "0" }, make("table", { class: "scores" }, make("thead", {}, head), make("tbody", {}, rows))));
}

function renderQuestions(report, fetchQuestions, ask) {
  let kind = report.counts.wins ? "wins" : "all";
  let total = 0;
  const list = make("ol", { class: "questions" });
  const more = make("button", { class: "quiet", type: "button", onclick: () => load(list.children.length) }, say("more"));
  const filter = make("input", { type: "search", placeholder: say("filter"), "aria-label": say("filter"), spellcheck: "false" });
  const kinds = ["wins", "losses", "ties", "all"].map((name) => make("button", {
    type: "button", role: "radio", "data-kind": name,
    onclick: () => { kind = name; load(0); },
  }, `${say(name)} `, make("small", {}, count(report.counts[name]))));

  async function load(start) {
    for (const button of kinds) button.setAttribute("aria-checked", button.dataset.kind === kind);
    const wanted = `${kind} ${filter.value}`;
    const found = await fetchQuestions(kind, filter.value.trim(), start, PAGE);
    if (!found || wanted !== `${kind} ${filter.value}`) return; // an answer overtaken by the next wish
    total = found.total;
    const items = found.questions.map((question) => make("li", {}, renderQuestion(question, ask)));
    if (start) list.append(...items);
    else list.replaceChildren(...(items.length ? items : [make("li", { class: "soft" }, say("none_found"))]));
    more.hidden = list.children.length >= total;
  }

  let waiting;
  filter.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => load(0), 200); });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const buttons = [...list.querySelectorAll("button")];
    const next = step && buttons[buttons.indexOf(document.activeElement) + step];
    if (next) {
      next.focus();
      event.preventDefault();
    }
  });
  load(0);
  return make("section", { class: "part" }, make("h2", {}, say("questions")),
    make("p", { class: "soft" }, say("click_note", { corpus: count(report.task.corpus) })),
    make("div", { class: "filters" }, make("div", { class: "segments", role: "radiogroup", "aria-label": say("questions") }, kinds), filter),
    list, more);
}

function renderQuestion(question, ask) {
  const ranks = Object.entries(question.ranks).map(([kind, rank]) => make("span", { class: `kind-${kind}` },
    make("span", { class: "dot" }), `${say(kind)} `, make("b", {}, rank ? say("rank_n", { rank }) : say("not_found"))));
  const direction = question.change > 0 ? "better" : question.change < 0 ? "worse" : "";
  return make("button", { type: "button", class: "question", onclick: () => ask(question.query) },
    make("span", { class: "asked" }, question.query),
    make("span", { class: "ranks" }, ranks),
    make("span", { class: `change ${direction}` }, question.change ? signed(question.change) : "0"));
}

function renderSlices(report) {
  const title = make("h2", {}, say("slices"));
  if (!report.slices.length) return make("section", { class: "part" }, title, make("p", { class: "soft" }, say("no_slices")));
  const systems = report.systems;
  const head = make("tr", {}, make("th", { scope: "col" }, say("slice")), make("th", { scope: "col" }, say("count")),
    systems.map((row) => make("th", { scope: "col" }, nameOf(row))), make("th", { scope: "col" }, say("difference")));
  let dimension = "";
  const rows = report.slices.flatMap((part) => {
    const opens = part.dimension !== dimension;
    dimension = part.dimension;
    const cells = systems.map((row) => {
      const bar = make("i", { class: `kind-${kindOf(row.role)}` });
      bar.style.width = `${Math.round(100 * part.systems[row.system].mean)}%`;
      return make("td", { class: "barred" }, short(part.systems[row.system].mean), make("span", { class: "bar", "aria-hidden": "true" }, bar));
    });
    const gap = part.difference;
    return [
      opens ? make("tr", { class: "group" }, make("th", { scope: "rowgroup", colspan: systems.length + 3 }, sayLabel(dimension) === dimension ? say(dimension) : sayLabel(dimension))) : null,
      make("tr", {}, make("th", { scope: "row" }, sayLabel(part.name)), make("td", {}, count(part.queries)), cells,
        make("td", { class: gap?.outcome.split(" ")[0] }, gap ? signed(gap.mean) : "")),
    ].filter(Boolean);
  });
  return make("section", { class: "part" }, title, make("p", { class: "soft" }, say("slices_note")),
    make("div", { class: "wide", tabindex: "0" }, make("table", { class: "slices" }, make("thead", {}, head), make("tbody", {}, rows))));
}

function renderCurves(report) {
  const curves = Object.entries(report.curves);
  return make("section", { class: "part" }, make("h2", {}, say("curves")),
    curves.length
      ? make("div", { class: "curves" }, curves.map(([name, points]) => make("figure", {}, make("figcaption", {}, say(name)), drawCurve(points, say(name), say("step")))))
      : make("p", { class: "soft" }, say("no_curves")));
}
