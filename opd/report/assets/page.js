"use strict";
// The page's own namespace: data, element making, numbers, and the sections that are plain tables.
// Texts of a run are untrusted: they become text nodes and attributes, never HTML.
window.opd = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  /** An element with attributes, `on...` listeners and children (nodes or strings; null is left out). */
  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return node;
  }

  /** A number with four digits; a dash for none. */
  function number(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (value === 0) return "0";
    const text = size >= 1e6 || size < 1e-3 ? value.toExponential(2)
      : size >= 1000 || Number.isInteger(value) ? value.toLocaleString("en", { maximumFractionDigits: 0 })
      : value.toPrecision(4);
    return text.replaceAll("-", "−");
  }

  /** Title, unit, meaning and better direction of a logged name; names that nobody described get their own. */
  function meaning(name) {
    if (Object.hasOwn(data.glossary, name)) return data.glossary[name];
    const family = Object.keys(data.glossary).find((key) => key.endsWith("/") && name.startsWith(key));
    if (family) return { ...data.glossary[family], title: `${data.glossary[family].title} ${name.slice(family.length)}` };
    return { title: name.split("/").slice(1).join(" ").replaceAll("_", " ") || name, unit: "", about: "", better: "" };
  }

  const several = () => data.runs.length > 1;
  const swatch = (i) => make("span", { class: `swatch run-${i % 6}`, "aria-hidden": "true" });
  const runName = (i) => make("span", { class: "run" }, several() ? swatch(i) : null, data.runs[i].label);
  const scroller = (label, child) => make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, child);
  const last = (list) => list[list.length - 1];

  /** A table of one column of names and one column for each run; `rows` are [name, [cell for each run]]. */
  function perRun(label, rows) {
    const head = several() ? make("thead", {}, make("tr", {}, make("th", { scope: "col" }), data.runs.map((_, i) => make("th", { scope: "col" }, runName(i))))) : null;
    const body = rows.map(([name, cells]) => make("tr", {}, make("th", { scope: "row" }, name), cells.map((cell) => make("td", {}, cell))));
    return scroller(label, make("table", { class: "facts" }, head, make("tbody", {}, body)));
  }

  function fill(id, ...children) {
    const section = document.getElementById(id);
    for (const old of [...section.children].slice(1)) old.remove();
    section.append(...children.filter(Boolean));
  }

  /** Steps that a run has logged so far. */
  function stepsDone(run) {
    return Math.max(0, ...Object.values(run.series).map((series) => last(series.x) || 0));
  }

  function drawHeader() {
    const header = document.getElementById("header");
    header.replaceChildren(
      make("h1", {}, ...data.runs.map((_, i) => runName(i))),
      make("ul", { class: "states" }, data.runs.map((run, i) => {
        const about = (run.facts.find(([name]) => name === "about") || [])[1];
        const ended = run.finished ? "" : data.live ? ", running" : ", no summary yet";
        return make("li", {}, several() ? swatch(i) : null, `${stepsDone(run)} of ${run.steps || "?"} steps${ended}`, about ? ` · ${about}` : "");
      })),
    );
    if (data.live) header.append(opd.live.status);
    for (const run of data.runs) for (const note of run.notes) header.append(make("p", { class: "note" }, `${several() ? `${run.label}: ` : ""}${note}`));
  }

  function drawSummary() {
    const facts = [...new Set(data.runs.flatMap((run) => run.facts.map(([name]) => name)))].filter((name) => name !== "about");
    const factRows = facts.map((name) => [name, data.runs.map((run) => (run.facts.find(([other]) => other === name) || [])[1] || "–")]);
    const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.series)))].filter((name) => name.startsWith("held_out/"));
    const columns = ["before", "after", "change"];
    const head = [];
    if (several()) head.push(make("tr", {}, make("th", { rowspan: 2, scope: "col" }, "held out"), data.runs.map((_, i) => make("th", { colspan: 3, scope: "colgroup" }, runName(i)))));
    head.push(make("tr", {}, several() ? null : make("th", { scope: "col" }, "held out"), data.runs.map(() => columns.map((column) => make("th", { scope: "col", class: "number" }, column)))));
    const rows = names.map((name) => {
      const { title, unit, about, better } = meaning(name);
      const cells = data.runs.map((run) => {
        const series = run.series[name];
        if (!series || !series.y.length) return columns.map(() => make("td", { class: "number" }, "–"));
        const before = series.y[0];
        const after = series.y.length > 1 ? last(series.y) : null;
        const change = after !== null && before ? (after - before) / Math.abs(before) : null;
        const good = !better || !change ? "" : (change < 0) === (better === "lower") ? "good" : "bad";
        const percent = change === null ? "–" : `${change > 0 ? "+" : change < 0 ? "−" : ""}${Math.abs(100 * change).toFixed(0)} %`;
        return [make("td", { class: "number" }, number(before)), make("td", { class: "number" }, number(after)), make("td", { class: `number ${good}`, title: good && (good === "good" ? "better" : "worse") }, percent)];
      });
      return make("tr", {}, make("th", { scope: "row", title: about }, title, unit ? make("small", {}, ` ${unit}`) : null), cells);
    });
    const table = make("table", { class: "summary" }, make("thead", {}, head), make("tbody", {}, rows));
    const measured = names.length ? scroller("Held-out measurements before and after", table) : make("p", { class: "empty" }, "Nothing measured on held-out prompts yet.");
    fill("summary", make("div", { class: "beside" }, measured, perRun("What the runs were", factRows)));
  }

  function drawRecipe() {
    const shown = (value) => make("code", {}, value === null || value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
    const differing = !several() ? null : data.differences.length
      ? [make("h3", {}, "Keys that differ"), perRun("Keys of the recipe that differ between the runs", data.differences.map(({ key, values }) => [make("code", {}, key), values.map(shown)]))]
      : [make("p", {}, "The recipes of these runs are equal.")];
    fill("recipe", ...(differing || []), ...data.runs.map((run, i) => make("details", { open: !several() }, make("summary", {}, runName(i), several() ? "" : ", resolved"),
      run.recipe ? make("pre", { tabindex: "0" }, run.recipe) : make("p", { class: "empty" }, "No recipe.yaml in this run."))));
  }

  function drawEnvironment() {
    const names = [...new Set(data.runs.flatMap((run) => run.environment.map(([name]) => name)))];
    const rows = names.map((name) => [name, data.runs.map((run) => (run.environment.find(([other]) => other === name) || [])[1] || "–")]);
    fill("environment", rows.length ? perRun("Environment and versions", rows) : make("p", { class: "empty" }, "No environment.json in these runs."));
  }

  return { data, make, number, meaning, several, swatch, runName, scroller, last, fill, drawHeader, drawSummary, drawRecipe, drawEnvironment, scales: {}, tokenRenderers: {}, rowRenderers: {} };
})();
