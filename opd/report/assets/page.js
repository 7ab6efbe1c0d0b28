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

  /** The same with three digits, for sentences and large figures. */
  const short = (value) => (value === null || value === undefined || Number.isNaN(value) || Math.abs(value) >= 1000 || Number.isInteger(value) || Math.abs(value) < 1e-3 ? number(value) : String(Number(value.toPrecision(3))).replace("-", "−"));

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
        const about = fact(run, "about");
        const ended = run.finished ? "" : data.live ? ", running" : ", no summary yet";
        return make("li", {}, several() ? swatch(i) : null, `${stepsDone(run)} of ${run.steps || "?"} steps${ended}`, about ? ` · ${about}` : "");
      })),
    );
    if (data.live) header.append(opd.live.status);
    for (const run of data.runs) for (const note of run.notes) header.append(make("p", { class: "note" }, `${several() ? `${run.label}: ` : ""}${note}`));
  }

  const fact = (run, name) => (run.facts.find(([other]) => other === name) || [])[1] || "";

  // ---- light and dark ----

  const THEMES = { system: "as the system has them", light: "light", dark: "dark" };
  const ICONS = {
    system: "M8 1.5a6.5 6.5 0 1 0 0 13a6.5 6.5 0 1 0 0-13zM8 3a5 5 0 0 1 0 10z",
    light: "M8 5a3 3 0 1 0 0 6a3 3 0 1 0 0-6zM7.4.8h1.2v2.4H7.4zM7.4 12.8h1.2v2.4H7.4zM.8 7.4h2.4v1.2H.8zM12.8 7.4h2.4v1.2h-2.4zM2.5 3.3l.8-.8 1.7 1.7-.8.8zM11 11.8l.8-.8 1.7 1.7-.8.8zM3.3 13.5l-.8-.8 1.7-1.7.8.8zM11.8 5l-.8-.8 1.7-1.7.8.8z",
    dark: "M6.2 1.6a6.6 6.6 0 1 0 8.2 8.2a5.4 5.4 0 0 1-8.2-8.2z",
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const repaint = [];

  /** Call `paint` when the colours have changed: charts hold theirs. */
  const onColours = (paint) => repaint.push(paint);
  const paintAll = () => repaint.forEach((paint) => paint());

  function icon(shape) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [key, value] of Object.entries({ viewBox: "0 0 16 16", width: 16, height: 16, fill: "currentColor", "fill-rule": "evenodd", "aria-hidden": "true" })) svg.setAttribute(key, value);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", shape);
    svg.append(path);
    return svg;
  }

  function drawTheme() {
    const buttons = Object.entries(THEMES).map(([name, title]) => make("button", { type: "button", "data-theme-name": name, "aria-pressed": String(name === "system"), title: `colours: ${title}`, "aria-label": `colours: ${title}`, onclick: () => {
      if (name === "system") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = name;
      for (const one of buttons) one.setAttribute("aria-pressed", String(one.dataset.themeName === name));
      paintAll();
    } }, icon(ICONS[name])));
    document.getElementById("theme").replaceChildren(make("div", { class: "segments", role: "group", "aria-label": "Colours" }, buttons));
    dark.addEventListener("change", paintAll);
  }

  /** A text as a file that the browser saves. */
  function save(name, kind, text) {
    const url = URL.createObjectURL(new Blob([text], { type: kind }));
    const link = make("a", { href: url, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
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

  return { data, make, number, short, meaning, several, swatch, runName, scroller, last, fill, fact, perRun, stepsDone, onColours, save, drawTheme, drawHeader, drawRecipe, drawEnvironment, scales: {}, tokenRenderers: {}, rowRenderers: {} };
})();
