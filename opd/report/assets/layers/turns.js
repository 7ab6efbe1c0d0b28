"use strict";
// An episode of a language agent: a row a turn, with what the student wrote, how far it was from the teacher, and what
// the environment said to it.
opd.rowRenderers.turns = (turns) => {
  const { make, number } = opd;
  if (!Array.isArray(turns)) return make("p", {}, JSON.stringify(turns));
  const reasons = { itself: "the episode is over", turns: "ended: most turns", context: "ended: the context is too long", lost: "ended: the environment failed" };
  const text = (value) => make("pre", { tabindex: "0" }, String(value ?? ""));
  const heard = (turn) => (Array.isArray(turn.heard) ? turn.heard : []).map((message) => [make("p", { class: "meta" }, String(message.role ?? "")), text(message.content)]);
  const row = (turn, i) => make("tr", {},
    make("th", { scope: "row" }, String(i + 1)),
    make("td", { class: "what" }, turn.fault ? make("p", { class: "meta" }, turn.fault) : null, text(turn.said)),
    make("td", {}, turn.divergence === undefined || turn.divergence === null ? "" : number(turn.divergence)),
    make("td", { class: "what" }, heard(turn), turn.ended ? make("p", { class: "meta" }, reasons[turn.ended] || String(turn.ended)) : null));
  const head = make("tr", {}, ["turn", "the student", "divergence, nats a token", "the environment"].map((name) => make("th", { scope: "col" }, name)));
  const table = opd.scroller("The turns of the episode", make("table", { class: "members" }, make("thead", {}, head), make("tbody", {}, turns.map(row))));
  const debates = turns.map((turn, i) => (turn.debate ? make("details", {}, make("summary", {}, `the teachers' debate before turn ${i + 1} was scored`), opd.rowRenderers.debate(turn.debate)) : null));
  return make("div", {}, table, debates);
};
