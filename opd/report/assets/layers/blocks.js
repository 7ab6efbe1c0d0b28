"use strict";
// A drafter's blocks, a line each: what the target let stand, what it did not, and its own token behind what stood.
opd.rowRenderers.blocks = (blocks, row) => {
  const { make } = opd;
  if (!Array.isArray(blocks)) return make("p", {}, String(blocks));
  let at = 0;
  const word = (name, text) => make(name, {}, make("code", {}, ...opd.visible(String(text ?? ""))));
  const line = ({ proposals, accepted, own }) => {
    const texts = row.tokens.slice(at, (at += Number(proposals) || 0));
    const parts = texts.map((text, k) => (k < accepted ? word("strong", text) : word("del", text)));
    if (own !== null && own !== undefined) parts.splice(accepted, 0, word("ins", own));
    const said = `${accepted} of ${texts.length}${own === null || own === undefined ? ", then the answer ends" : ""}`;
    return make("li", {}, ...parts.flatMap((part) => [part, " "]), make("span", { class: "number" }, said));
  };
  return make("div", {}, make("p", {}, "bold: accepted; underlined: the target's own; crossed out: not accepted"), make("ol", { class: "blocks" }, blocks.map(line)));
};
