// What the page says, in Korean and English.

const WORDS = {
  skip: ["본문으로", "Skip to content"],
  tabs: ["보기", "Views"],
  tab_search: ["검색", "Search"],
  tab_report: ["보고서", "Report"],
  tab_own: ["내 문단", "My passages"],
  other_language: ["English", "한국어"],
  ask: ["찾기", "Search"],
  rank: ["순위 매기기", "Rank"],
  ask_label: ["질문", "Question"],
  ask_placeholder: ["무엇이 궁금한가요?", "Ask in Korean"],
  suggestions: ["평가 질문", "Evaluation questions"],
  columns: ["비교할 대상", "Columns"],
  base: ["학습 전", "Base"],
  tuned: ["학습 후", "Tuned"],
  bm25: ["BM25", "BM25"],
  hybrid: ["하이브리드", "Hybrid"],
  about_bm25: ["낱말이 겹치는 정도", "overlap of words"],
  about_hybrid: ["학습 후 + BM25", "tuned + BM25"],
  corpus: ["{name} · 문단 {count}개", "{name} · {count} passages"],
  try_one: ["정답을 아는 질문으로 해 보세요", "Try a question whose answer is known"],
  no_examples: ["질문을 적으면 고른 모델들의 답이 나란히 보입니다.", "Write a question to see the answers side by side."],
  try_note: ["학습에 쓰지 않은 질문 {count}개 가운데 몇 개입니다.", "A few of {count} questions kept out of training."],
  try_note_all: ["평가 질문 {count}개 가운데 몇 개입니다.", "A few of {count} evaluation questions."],
  searching: ["찾는 중…", "Searching…"],
  ranking: ["순위를 매기는 중…", "Ranking…"],
  nothing: ["겹치는 낱말이 있는 문단이 없습니다.", "No passage shares a word with the question."],
  gold: ["정답 문단", "Right passage"],
  gold_ranks: ["정답 문단의 순위", "Rank of the right passage"],
  answer: ["정답", "Answer"],
  rank_n: ["{rank}위", "#{rank}"],
  rank_only: ["{rank}", "{rank}"],
  beyond: ["{depth}위 밖", "below {depth}"],
  up: ["{other}보다 {by}계단 위", "{by} up from {other}"],
  down: ["{other}보다 {by}계단 아래", "{by} down from {other}"],
  same: ["{other}과(와) 같은 순위", "same as in {other}"],
  fresh: ["{other}에서는 {depth}위 밖", "below {depth} in {other}"],
  score: ["점수 {score}", "score {score}"],
  ms: ["{ms}ms", "{ms} ms"],
  ms_title: ["기다림까지 합친 시간", "time taken, waiting included"],
  more_text: ["펼치기", "Expand"],
  unreachable: [
    "서버에 닿지 않습니다. 터미널에서 koret web이 켜져 있는지 확인하세요.",
    "The server cannot be reached. Check that koret web is still running in its terminal.",
  ],
  retry: ["다시 해 보기", "Try again"],
  empty_query: ["질문을 적어 주세요.", "Write a question first."],
  no_report_title: ["보고서가 없습니다", "No report"],
  no_report: [
    "여기 열린 모델은 끝난 학습에서 나온 것이 아닙니다. koret train으로 학습한 뒤 koret web을 다시 켜면 보고서가 보입니다.",
    "These models come from no finished training. Train one with koret train, start koret web again, and its report is here.",
  ],
  loading: ["불러오는 중…", "Loading…"],
  verdict_better: ["학습한 모델이 더 낫습니다", "The tuned model is better"],
  verdict_worse: ["학습한 모델이 더 못합니다", "The tuned model is worse"],
  "verdict_not distinguishable": ["차이를 말할 수 없습니다", "No difference can be claimed"],
  verdict_none: ["비교할 바탕 모델이 없습니다", "There is no base to compare with"],
  lexical_better: ["BM25보다도 낫습니다", "Also better than BM25"],
  lexical_worse: ["BM25에는 못 미칩니다", "Not as good as BM25"],
  "lexical_not distinguishable": ["BM25와는 차이를 말할 수 없습니다", "Not distinguishable from BM25"],
  figures: [
    "nDCG@10 {a} → {b} ({gap}, 95% 구간 {low} … {high})",
    "nDCG@10 {a} → {b} ({gap}, 95% interval {low} … {high})",
  ],
  asked: ["질문 {queries}개 · 글 {groups}개 · 문단 {corpus}개에서", "{queries} questions · {groups} articles · among {corpus} passages"],
  clean: ["학습 자료는 이 질문과 문단을 본 적이 없습니다.", "Training has seen none of these questions and passages."],
  not_clean: ["학습 자료와 겹치는 것이 있습니다: 수치를 그대로 믿지 마세요.", "Training has seen some of this: do not take the numbers at face value."],
  clean_unknown: ["학습 자료와 겹치는지 알 수 없습니다.", "Whether training has seen any of this is not known."],
  scores: ["점수와 95% 구간", "Scores and 95% intervals"],
  difference: ["차이", "difference"],
  questions: ["질문별 승패", "Wins and losses"],
  wins: ["좋아진 질문", "Wins"],
  losses: ["나빠진 질문", "Losses"],
  ties: ["그대로인 질문", "Ties"],
  all: ["모두", "All"],
  filter: ["질문에서 찾기", "Filter questions"],
  click_note: [
    "질문을 누르면 검색 화면에서 두 순위를 나란히 봅니다. 여기 순위는 평가 문단 {corpus}개 가운데의 것입니다.",
    "Choose a question to see both rankings side by side. Ranks here are among the {corpus} evaluated passages.",
  ],
  none_found: ["그런 질문이 없습니다.", "There is no such question."],
  more: ["더 보기", "Show more"],
  not_found: ["없음", "none"],
  slices: ["어떤 질문에서 좋은가", "Where it is good, and where not"],
  slices_note: [
    "나눈 묶음마다의 nDCG@10. 비교가 많으면 스무 번에 한 번쯤은 우연히 차이로 보입니다.",
    "nDCG@10 in parts of the questions. Of many comparisons about one in twenty looks real by chance.",
  ],
  no_slices: ["묶음별 점수가 없습니다.", "There are no scores by part."],
  slice: ["묶음", "part"],
  count: ["질문", "questions"],
  curves: ["학습 곡선", "Training curves"],
  no_curves: ["곡선이 기록되지 않았습니다.", "No curves were recorded."],
  "train/loss": ["손실", "Loss"],
  "eval/ndcg@10": ["평가 nDCG@10", "Evaluated nDCG@10"],
  "train/learning_rate": ["학습률", "Learning rate"],
  "train/pairs_per_second": ["초당 학습 쌍", "Pairs a second"],
  step: ["단계", "step"],
  "question type": ["질문 유형", "question type"],
  "answer kind": ["답의 꼴", "answer kind"],
  "word overlap": ["낱말 겹침", "word overlap"],
  "answer in": ["답의 자리", "answer in"],
  "passage length": ["문단 길이", "passage length"],
  "article length": ["글 길이", "article length"],
  own_passages: ["내 문단", "Your passages"],
  own_placeholder: [
    "문단을 붙여 넣으세요. 빈 줄로 나누고, 빈 줄이 없으면 한 줄을 한 문단으로 봅니다.",
    "Paste passages, separated by blank lines; without blank lines each line is a passage.",
  ],
  own_count: ["문단 {count}개 (최대 {most}개, 한 문단 {chars}자)", "{count} passages (at most {most}, {chars} characters each)"],
  own_example: ["예시 넣기", "Fill in an example"],
  own_empty: ["문단과 질문을 넣으면 모델마다 순위를 매깁니다. 저장하지 않습니다.", "With passages and a question, each model ranks them. Nothing is stored."],
  no_passages: ["문단을 하나 이상 넣어 주세요.", "Paste at least one passage."],
};

// Labels made by the evaluation, as they are put in Korean; what is not listed stays as it is.
const KOREAN_LABELS = [
  ["first third", "앞부분"], ["middle third", "가운데"], ["last third", "뒷부분"],
  [/^low: to (.*)$/, "낮음: ~$1"], [/^middle: to (.*)$/, "중간: ~$1"], [/^high: above (.*)$/, "높음: $1~"],
  [/ characters$/, "자"], [/ characters~$/, "자~"],
  ["short", "낱말"], ["sentence", "문장"], ["list", "목록"], ["table", "표"],
  ["who", "누구"], ["when", "언제"], ["where", "어디"], ["what", "무엇"], ["which", "어느"], ["why", "왜"],
  ["how many", "얼마나"], ["how much", "얼마나"], ["how", "어떻게"], ["other", "그 밖"], ["name", "이름"],
];

let language = (navigator.languages || [navigator.language]).some((l) => l && l.startsWith("ko")) ? "ko" : "en";
try {
  language = localStorage.getItem("language") || language;
} catch { /* storage is switched off: the browser's language stands */ }

export const currentLanguage = () => language;

export function switchLanguage() {
  language = language === "ko" ? "en" : "ko";
  try {
    localStorage.setItem("language", language);
  } catch { /* remembered for this page only */ }
}

export function say(name, values = {}) {
  const pair = WORDS[name] || [name, name];
  return pair[language === "ko" ? 0 : 1].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

export function sayLabel(label) {
  if (language !== "ko") return label;
  return KOREAN_LABELS.reduce(
    (text, [from, to]) => (typeof from === "string" ? (text === from ? to : text) : text.replace(from, to)), label);
}

export const count = (number) => number.toLocaleString(language === "ko" ? "ko-KR" : "en-US");
