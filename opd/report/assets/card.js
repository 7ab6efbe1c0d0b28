"use strict";
// The card on top: what came out, in words and in a few large numbers; who learnt from whom, on what and for how long;
// and every held-out measurement, before and after.
opd.card = (() => {
  const { data, make, number, short, meaning, several, last } = opd;
  // What a verdict is about, the first of these that was measured twice; then how near the student came to its teacher.
  const OUTCOMES = ["held_out/accuracy", "held_out/pass_at_k", "held_out/acceptance_length", "held_out/reward"];
  const DISTANCES = ["held_out/forward_kl", "held_out/reverse_kl", "held_out/forward_kl_top_k", "held_out/reverse_kl_top_k", "held_out/reverse_kl_sampled"];
  const TILES = 4;
  const FEW = 100;
  let open = several();

  const isShare = (name) => meaning(name).unit.startsWith("share");
  const said = (name, value) => (isShare(name) ? `${short(100 * value)}\u00a0%` : short(value));

  /** {before, after, change} of a held-out name; `after` is null while it was measured once. */
  function ends(run, name) {
    const series = run.series[name];
    const known = series ? series.y.filter((y) => y !== null) : [];
    if (!known.length) return null;
    const after = known.length > 1 ? last(known) : null;
    return { name, before: known[0], after, change: after === null ? null : after - known[0] };
  }

  /** 1 better, -1 worse, 0 neither, or of a change of less than 1 % of the larger of both. */
  function sign({ name, before, after, change }) {
    const { better } = meaning(name);
    if (!better || !change || Math.abs(change) < 0.01 * Math.max(Math.abs(before), Math.abs(after))) return 0;
    return (change < 0) === (better === "lower") ? 1 : -1;
  }

  const names = (run) => Object.keys(run.series).filter((name) => name.startsWith("held_out/"));

  /** What the card shows large: outcomes first, then distances, then whatever else has a better direction. */
  function headline(run) {
    const known = [...OUTCOMES, ...DISTANCES, ...names(run).filter((name) => meaning(name).better && !/teacher_|_low$|_high$|accepted_at/.test(name))];
    return [...new Set(known)].map((name) => ends(run, name)).filter(Boolean);
  }

  /** The verdict of a run: {word, kind, sentences}. */
  function verdict(run) {
    const all = headline(run);
    if (!all.length) return { word: "not measured", kind: "", sentences: ["Nothing was measured on held-out prompts yet."] };
    const measured = all.filter((one) => one.after !== null);
    if (!measured.length) return { word: run.finished ? "measured once" : "under way", kind: "", sentences: ["Held-out prompts were measured before training alone so far."] };
    const outcome = measured.find(({ name }) => OUTCOMES.includes(name));
    const distance = measured.find(({ name }) => DISTANCES.includes(name));
    const first = outcome || distance || measured[0];
    const verb = (one) => (Math.abs(one.change) < 1e-12 ? "stayed at" : one.change > 0 ? "rose from" : "fell from");
    const told = (one, subject) => `${subject} ${verb(one)} ${one.change ? `${said(one.name, one.before)} to ${said(one.name, one.after)}` : said(one.name, one.after)}`;
    const sentences = [];
    if (outcome) {
      const teacher = outcome.name === "held_out/accuracy" ? ends(run, "held_out/teacher_accuracy") : null;
      const own = teacher ? `; the teacher’s own greedy answers have ${said("held_out/teacher_accuracy", teacher.after ?? teacher.before)}` : "";
      sentences.push(`${told(outcome, `Held-out ${meaning(outcome.name).title}`)}${own}.`);
    }
    if (distance) {
      const near = { 1: "The student came nearer to its teacher", "-1": "The student went away from its teacher", 0: "The student is as far from its teacher as before" }[sign(distance)];
      sentences.push(`${near}: ${told(distance, meaning(distance.name).title)} ${meaning(distance.name).unit}.`);
    }
    if (!outcome && !distance) sentences.push(`${told(first, `Held-out ${meaning(first.name).title}`)}.`);
    const lost = measured.filter((one) => one !== outcome && one !== distance && sign(one) < 0);
    if (lost.length) sentences.push(`Worse than before: ${lost.map((one) => `${meaning(one.name).title} (${said(one.name, one.before)} to ${said(one.name, one.after)})`).join(", ")}.`);
    const count = new Set(opd.rows.entries(data.runs.indexOf(run), "held_out").map(({ id }) => id)).size;
    const total = opd.rows.total(data.runs.indexOf(run), "held_out");
    if (count && count < FEW && opd.rows.entries(data.runs.indexOf(run), "held_out").length === total) sentences.push(`Measured on ${count} prompt${count > 1 ? "s" : ""}, so small differences mean little.`);
    const signs = [outcome, distance].filter(Boolean).map(sign);
    if (!signs.length) signs.push(sign(first));
    const up = signs.includes(1);
    const down = signs.includes(-1);
    const [word, kind] = up && down ? ["mixed", "mixed"] : up ? ["better", "good"] : down ? ["worse", "bad"] : ["no change", ""];
    return { word: run.finished ? word : `so far ${word}`, kind, sentences };
  }

  function tile(one) {
    const { title, unit, about } = meaning(one.name);
    const kind = { 1: "good", "-1": "bad", 0: "" }[sign(one)];
    const words = { 1: "better", "-1": "worse", 0: "" }[sign(one)];
    const values = one.after === null ? [make("b", {}, said(one.name, one.before))]
      : [make("span", { class: "was" }, said(one.name, one.before)), make("span", { class: "arrow", "aria-label": "to" }, "→"), make("b", {}, said(one.name, one.after))];
    return make("li", { class: `tile ${kind}`, title: about }, make("span", { class: "label" }, title), make("span", { class: "big" }, values), make("small", {}, isShare(one.name) ? unit.replace("share of", "of") : unit, words ? `${unit ? ", " : ""}${words}` : ""));
  }

  /** Every held-out measurement of every run: before, after and the change. */
  function table() {
    const all = [...new Set(data.runs.flatMap(names))];
    if (!all.length) return null;
    const columns = ["before", "after", "change"];
    const head = [];
    if (several()) head.push(make("tr", {}, make("th", { rowspan: 2, scope: "col" }, "held out"), data.runs.map((_, i) => make("th", { colspan: 3, scope: "colgroup" }, opd.runName(i)))));
    head.push(make("tr", {}, several() ? null : make("th", { scope: "col" }, "held out"), data.runs.map(() => columns.map((column) => make("th", { scope: "col", class: "number" }, column)))));
    const rows = all.map((name) => {
      const { title, unit, about } = meaning(name);
      const cells = data.runs.map((run) => {
        const one = ends(run, name);
        if (!one) return columns.map(() => make("td", { class: "number" }, "–"));
        const kind = { 1: "good", "-1": "bad", 0: "" }[sign(one)];
        const percent = one.change === null || !one.before ? "–" : `${one.change > 0 ? "+" : one.change < 0 ? "−" : ""}${Math.abs(100 * (one.change / Math.abs(one.before))).toFixed(0)} %`;
        return [make("td", { class: "number" }, number(one.before)), make("td", { class: "number" }, number(one.after)), make("td", { class: `number ${kind}`, title: kind && (kind === "good" ? "better" : "worse") }, percent)];
      });
      return make("tr", {}, make("th", { scope: "row", title: about }, title, unit ? make("small", {}, ` ${unit}`) : null), cells);
    });
    const made = make("table", { class: "summary" }, make("thead", {}, head), make("tbody", {}, rows));
    return make("details", { class: "all", open, ontoggle: (event) => { open = event.target.open; } }, make("summary", {}, `All ${all.length} held-out measurements, before and after`), opd.scroller("Held-out measurements before and after", made));
  }

  /** Steps, names and values of everything that was logged; texts that a spreadsheet would take for a formula are
   *  quoted as text. */
  function csv() {
    const all = [...new Set(data.runs.flatMap((run) => Object.keys(run.series)))];
    const cell = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const safe = (text) => cell(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text);
    const lines = [["run", "step", ...all].map(safe).join(",")];
    for (const run of data.runs) {
      const steps = [...new Set(Object.values(run.series).flatMap(({ x }) => x))].sort((a, b) => a - b);
      const columns = all.map((name) => new Map(run.series[name] ? run.series[name].x.map((x, i) => [x, run.series[name].y[i]]) : []));
      for (const step of steps) lines.push([safe(run.label), String(step), ...columns.map((column) => { const y = column.get(step); return y === null || y === undefined ? "" : String(y); })].join(","));
    }
    return `${lines.join("\n")}\n`;
  }

  function draw() {
    const cards = data.runs.map((run, i) => {
      const { word, kind, sentences } = verdict(run);
      const tiles = headline(run).slice(0, TILES).map(tile);
      const facts = run.facts.filter(([name]) => !["about", "name"].includes(name));
      return make("article", { class: "result", "aria-label": run.label },
        several() ? make("h3", {}, opd.runName(i)) : null,
        make("div", { class: "verdict" }, make("span", { class: `chip ${kind}` }, word), make("p", {}, sentences.join(" "))),
        tiles.length ? make("ul", { class: "tiles" }, tiles) : null,
        make("dl", { class: "facts" }, facts.map(([name, text]) => make("div", {}, make("dt", {}, name), make("dd", {}, text)))));
    });
    opd.fill("summary", make("div", { class: several() ? "results" : "" }, cards), table());
  }

  return { draw, verdict, csv };
})();
