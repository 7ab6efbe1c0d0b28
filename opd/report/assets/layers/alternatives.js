"use strict";
// The most likely tokens at this state, each side's own: {side: for each token [[text, probability], ...]}.
opd.tokenRenderers.alternatives = (sides, i, row) => {
  const { make } = opd;
  const list = ([side, tokens]) => make("div", {}, make("h4", {}, side), make("ol", { class: "ranked" }, (tokens[i] || []).map(([text, probability]) => {
    const bar = make("span", { class: "bar-of" });
    bar.style.setProperty("--share", Math.min(1, Math.max(0, probability || 0)));
    return make("li", { class: text === row.tokens[i] ? "taken" : "" }, bar, make("code", {}, ...opd.visible(text)), make("span", { class: "number" }, (probability ?? 0).toFixed(4)));
  })));
  if (!Object.values(sides).some((tokens) => tokens[i] && tokens[i].length)) return make("p", { class: "empty" }, "not kept for this token");
  return make("div", { class: "sides" }, Object.entries(sides).map(list));
};
