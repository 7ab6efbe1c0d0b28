"use strict";
// What the teachers wrote about the prompt before they scored these tokens: a row a round, a column an expert.
opd.rowRenderers.debate = (debate) => {
  const { make, number } = opd;
  const { experts, rounds, sure, weights, right } = debate || {};
  if (!Array.isArray(experts) || !Array.isArray(rounds)) return make("p", {}, JSON.stringify(debate));
  const verdict = (value) => (value === null || value === undefined ? null : make("span", {}, value >= 1 ? "right" : value <= 0 ? "wrong" : `reward ${number(value)}`));
  const said = (value) => (value === null || value === undefined ? make("span", {}, "no tag") : make("span", {}, `sure ${number(value)}`));
  const cell = (r, k) => make("td", { class: "what" }, make("p", { class: "meta" }, verdict(right && right[r] && right[r][k]), said(sure && sure[r] && sure[r][k])), make("pre", { tabindex: "0" }, String(rounds[r][k])));
  const head = make("tr", {}, make("th", { scope: "col" }, "round"), experts.map((name, k) => make("th", { scope: "col" }, `${name}, weight ${number(weights && weights[k])}`)));
  const body = rounds.map((_, r) => make("tr", {}, make("th", { scope: "row" }, String(r + 1)), experts.map((_, k) => cell(r, k))));
  return opd.scroller("The debate of the teachers", make("table", { class: "members" }, make("thead", {}, head), make("tbody", {}, body)));
};
