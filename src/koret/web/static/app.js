// The page itself: tabs, forms, addresses and keys.

import { make, moveWithin } from "./elements.js";
import { renderNoReport, renderReport } from "./report.js";
import { columnName, describeCorpus, renderResults } from "./results.js";
import { count, currentLanguage, say, switchLanguage } from "./words.js";

const TABS = ["search", "report", "own"];
const at = (id) => document.getElementById(id);
const page = { state: null, report: null, chosen: new Set(), answer: null, ranked: null, turn: 0, tab: null };

// ---- talking to the server

class Failure extends Error {
  constructor(words) {
    super(words.en);
    this.words = words;
  }
}

async function fetchJson(path, body) {
  let response;
  try {
    response = await fetch(path, body === undefined ? {} : {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
  } catch {
    throw new Failure({ unreachable: true });
  }
  let answer;
  try {
    answer = await response.json();
  } catch {
    throw new Failure({ unreachable: true });
  }
  if (!response.ok) throw new Failure(answer.error ?? { unreachable: true });
  return answer;
}

function renderFailure(target, failure, retry) {
  if (!(failure instanceof Failure)) throw failure;
  const words = failure.words.unreachable ? say("unreachable") : failure.words[currentLanguage()];
  target.replaceChildren(make("div", { class: "notice", role: "alert" }, make("p", {}, words),
    retry ? make("button", { class: "quiet", type: "button", onclick: retry }, say("retry")) : null));
}

const renderWaiting = (target, word) => target.replaceChildren(make("p", { class: "soft waiting" }, say(word)));

// ---- search

async function search(query, { remember = true } = {}) {
  const target = at("search-results");
  hideSuggestions();
  at("query").value = query;
  if (!query.trim()) {
    page.answer = null;
    renderStart();
    return;
  }
  if (remember) goTo("search", query.trim());
  const turn = ++page.turn;
  const slow = setTimeout(() => turn === page.turn && renderWaiting(target, "searching"), 150);
  try {
    const answer = await fetchJson("api/search", { query, columns: [...page.chosen], k: page.state.top_k });
    if (turn !== page.turn) return; // a newer question has been asked since
    page.answer = answer;
    renderResults(target, answer, page.state.columns, true);
    giveFirstCardFocusability(target);
  } catch (failure) {
    if (turn === page.turn) renderFailure(target, failure, () => search(query, { remember: false }));
  } finally {
    clearTimeout(slow);
  }
}

function giveFirstCardFocusability(target) {
  target.querySelector(".card")?.setAttribute("tabindex", "0");
}

function renderStart() {
  const { examples, questions } = page.state;
  at("search-results").replaceChildren(examples.length
    ? make("div", { class: "start" }, make("h2", {}, say("try_one")),
      make("ul", { class: "examples" }, examples.map((text) => make("li", {},
        make("button", { type: "button", onclick: () => search(text) }, text)))),
      make("p", { class: "soft" }, say(page.state.report ? "try_note" : "try_note_all", { count: count(questions) })))
    : make("div", { class: "start" }, make("p", { class: "soft" }, say("no_examples"))));
}

// ---- suggestions below the box

let suggesting = 0; // counts up: an answer to an older wish is passed over
let suggestSoon;

async function suggest() {
  const text = at("query").value.trim();
  const turn = ++suggesting;
  if (!page.state.questions || text.length < 1) return hideSuggestions();
  let found = [];
  try {
    found = (await fetchJson(`api/questions?text=${encodeURIComponent(text.slice(0, 200))}`)).questions;
  } catch { /* suggestions are a courtesy: the search itself says what is wrong */ }
  if (turn !== suggesting || document.activeElement !== at("query")) return undefined;
  const list = at("suggestions");
  list.replaceChildren(...found.map((question, place) => make("li", {
    role: "option", id: `suggestion-${place}`, "aria-selected": "false",
    onpointerdown: (event) => { event.preventDefault(); search(question); },
  }, question)));
  list.hidden = !found.length;
  at("query").setAttribute("aria-expanded", String(Boolean(found.length)));
  return undefined;
}

function hideSuggestions() {
  suggesting++;
  clearTimeout(suggestSoon);
  at("suggestions").hidden = true;
  at("query").setAttribute("aria-expanded", "false");
  at("query").removeAttribute("aria-activedescendant");
}

function chooseSuggestion(step) {
  const options = [...at("suggestions").children];
  const now = options.findIndex((option) => option.getAttribute("aria-selected") === "true");
  const next = Math.max(-1, Math.min(options.length - 1, now + step));
  options.forEach((option, place) => option.setAttribute("aria-selected", String(place === next)));
  if (next < 0) return at("query").removeAttribute("aria-activedescendant");
  options[next].scrollIntoView({ block: "nearest" });
  return at("query").setAttribute("aria-activedescendant", options[next].id);
}

function typeInBox(event) {
  const open = !at("suggestions").hidden;
  const chosen = at("suggestions").querySelector('[aria-selected="true"]');
  if (event.isComposing) return; // a syllable is still being put together
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (open) chooseSuggestion(event.key === "ArrowDown" ? 1 : -1);
    else if (event.key === "ArrowDown") at("search-results").querySelector(".card, button")?.focus();
  } else if (event.key === "Enter" && open && chosen) {
    event.preventDefault();
    search(chosen.textContent);
  } else if (event.key === "Escape" && open) {
    event.preventDefault();
    hideSuggestions();
  }
}

// ---- own passages

const splitPassages = (text) => text.split(/\n\s*\n/.test(text.trim()) ? /\n\s*\n/ : /\n/).map((p) => p.trim()).filter(Boolean);

function countPassages() {
  const { passages, passage } = page.state.limits;
  at("own-count").textContent = say("own_count", { count: count(splitPassages(at("own-passages").value).length), most: passages, chars: count(passage) });
}

async function rankOwn() {
  const target = at("own-results");
  const passages = splitPassages(at("own-passages").value);
  const query = at("own-query").value;
  if (!passages.length || !query.trim()) {
    const [field, words] = passages.length ? ["own-query", "empty_query"] : ["own-passages", "no_passages"];
    target.replaceChildren(make("p", { class: "notice", role: "alert" }, say(words)));
    at(field).focus();
    return;
  }
  renderWaiting(target, "ranking");
  try {
    page.ranked = await fetchJson("api/rank", { query, passages, columns: [...page.chosen] });
    renderResults(target, page.ranked, page.state.columns, false);
    giveFirstCardFocusability(target);
  } catch (failure) {
    page.ranked = null;
    renderFailure(target, failure, rankOwn);
  }
}

function fillExample() {
  at("own-passages").value = [
    "배추김치는 소금에 절인 배추에 고춧가루와 마늘, 젓갈로 만든 양념을 넣어 익힌다.",
    "동치미는 무를 소금물에 담가 익힌 물김치로, 겨울에 차게 먹는다.",
    "세종은 1443년에 훈민정음을 만들고 1446년에 반포하였다.",
    "한라산은 제주도 가운데에 솟은 높이 1,947m의 산이다.",
    "축구는 열한 명씩 두 편이 공을 발로 차 상대의 골에 넣는 경기이다.",
  ].join("\n\n");
  at("own-query").value = "한글을 만든 임금은 누구인가?";
  countPassages();
  rankOwn();
}

// ---- report

async function showReport() {
  const target = at("report");
  if (!page.state.report) return renderNoReport(target);
  try {
    if (!page.report) {
      renderWaiting(target, "loading");
      page.report = await fetchJson("api/report");
    }
    return renderReport(target, page.report, fetchQuestions, (query) => search(query));
  } catch (failure) {
    return renderFailure(target, failure, showReport);
  }
}

async function fetchQuestions(kind, text, start, number) {
  try {
    return await fetchJson(`api/report/questions?${new URLSearchParams({ kind, text, start, count: number })}`);
  } catch (failure) {
    renderFailure(at("report"), failure, showReport);
    return null;
  }
}

// ---- tabs, columns, language, addresses

function goTo(tab, query = "") {
  const address = `#/${tab}${query ? `?${new URLSearchParams({ q: query })}` : ""}`;
  if (location.hash !== address) history.pushState(null, "", address);
  showTab(tab);
}

function showTab(tab) {
  const before = page.tab;
  page.tab = tab;
  for (const name of TABS) {
    const own = name === tab;
    at(name).hidden = !own;
    at(`tab-${name}`).setAttribute("aria-selected", String(own));
    at(`tab-${name}`).tabIndex = own ? 0 : -1;
  }
  if (before !== tab) window.scrollTo(0, 0);
  if (tab === "report" && before !== "report") showReport();
}

function followAddress() {
  const [, tab, rest] = location.hash.match(/^#\/(\w+)(?:\?(.*))?$/) ?? [];
  showTab(TABS.includes(tab) ? tab : "search");
  if (page.tab === "search") search(new URLSearchParams(rest ?? "").get("q") ?? "", { remember: false });
}

function renderColumnChoice() {
  const least = Math.min(2, page.state.columns.length);
  for (const where of ["search", "own"]) {
    const field = at(`${where}-columns`);
    const chips = page.state.columns.map((column) => {
      const box = make("input", { type: "checkbox", value: column.id, checked: page.chosen.has(column.id) });
      box.disabled = box.checked && page.chosen.size <= least;
      box.addEventListener("change", () => chooseColumn(column.id, box.checked));
      return make("label", { class: `chip kind-${column.kind}`, title: column.name }, box, make("span", { class: "dot" }), columnName(column));
    });
    const focused = field.contains(document.activeElement) ? document.activeElement.value : null;
    field.replaceChildren(field.querySelector("legend"), ...chips);
    if (focused) field.querySelector(`input[value="${focused}"]`)?.focus();
  }
}

function chooseColumn(id, wanted) {
  if (wanted) page.chosen.add(id);
  else page.chosen.delete(id);
  renderColumnChoice();
  if (page.tab === "search" && at("query").value.trim()) search(at("query").value, { remember: false });
  if (page.tab === "own" && page.ranked) rankOwn();
}

function renderWords() {
  document.documentElement.lang = currentLanguage();
  for (const one of document.querySelectorAll("[data-word]")) one.textContent = say(one.dataset.word);
  for (const one of document.querySelectorAll("[data-placeholder]")) one.placeholder = say(one.dataset.placeholder);
  for (const one of document.querySelectorAll("[data-label]")) one.setAttribute("aria-label", say(one.dataset.label));
  at("language").textContent = say("other_language");
  at("language").lang = currentLanguage() === "ko" ? "en" : "ko";
  if (!page.state) return;
  at("corpus").textContent = describeCorpus(page.state.corpus);
  renderColumnChoice();
  countPassages();
  if (page.answer) renderResults(at("search-results"), page.answer, page.state.columns, true);
  else renderStart();
  if (page.ranked) renderResults(at("own-results"), page.ranked, page.state.columns, false);
  else at("own-results").replaceChildren(make("p", { class: "soft" }, say("own_empty")));
  if (page.tab === "report") showReport();
}

function typeAnywhere(event) {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    if (page.tab === "report") goTo("search");
    at(page.tab === "own" ? "own-query" : "query").select();
  } else if (event.key === "Escape" && typing) {
    document.activeElement.blur();
  }
}

function listen() {
  at("search-form").addEventListener("submit", (event) => { event.preventDefault(); search(at("query").value); });
  at("own-form").addEventListener("submit", (event) => { event.preventDefault(); rankOwn(); });
  at("own-example").addEventListener("click", fillExample);
  at("own-passages").addEventListener("input", countPassages);
  at("language").addEventListener("click", () => { switchLanguage(); renderWords(); });
  at("query").addEventListener("input", () => { clearTimeout(suggestSoon); suggestSoon = setTimeout(suggest, 150); });
  at("query").addEventListener("keydown", typeInBox);
  at("query").addEventListener("blur", hideSuggestions);
  for (const name of TABS) {
    at(`tab-${name}`).addEventListener("click", () => goTo(name, name === "search" && page.answer ? page.answer.query : ""));
  }
  document.querySelector(".tabs").addEventListener("keydown", (event) => {
    const moved = moveWithin(TABS.map((name) => at(`tab-${name}`)), event, "ArrowLeft", "ArrowRight");
    if (moved) document.activeElement.click();
  });
  document.addEventListener("keydown", typeAnywhere);
  window.addEventListener("popstate", followAddress);
}

async function start() {
  renderWords();
  try {
    page.state = await fetchJson("api/state");
  } catch (failure) {
    at("search").hidden = false;
    renderFailure(at("search-results"), failure, () => location.reload());
    return;
  }
  page.chosen = new Set(page.state.columns.map((column) => column.id));
  listen();
  renderWords();
  followAddress();
  if (matchMedia("(hover: hover)").matches) at("query").focus();
}

start();
