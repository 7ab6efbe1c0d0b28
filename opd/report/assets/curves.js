"use strict";
// Everything logged, one small chart a name, runs overlaid; and the phases of a step stacked. Drawn when scrolled to.
opd.curves = (() => {
  const { data, make, meaning } = opd;
  const GROUPS = { held_out: "Held out", train: "Training" };
  const charts = new Map(); // name -> {node, traces, layout, visible, drawn}
  let logarithmic = false;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const runColour = (i) => css(`--run-${i % 6}`);
  const plain = (text) => text.replaceAll("<", "&lt;"); // plotly reads some tags in names
  const touch = matchMedia("(pointer: coarse)").matches;

  function layout(height, extra = {}) {
    const axis = { gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), tickfont: { size: 11 }, automargin: true };
    return {
      height, margin: { l: 44, r: 10, t: 6, b: 30 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
      font: { color: css("--text"), family: "inherit", size: 12 }, showlegend: false, hovermode: "x unified",
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--text"), size: 12 } },
      dragmode: touch ? false : "zoom",
      xaxis: { ...axis, exponentformat: "none", separatethousands: true, title: { text: "step", font: { size: 11 }, standoff: 2 }, rangemode: "tozero" },
      yaxis: { ...axis, exponentformat: "e", minexponent: 5, fixedrange: touch, nticks: 5 }, ...extra,
    };
  }

  function curve(name) {
    const traces = data.runs.flatMap((run, i) => {
      const series = run.series[name];
      if (!series) return [];
      const few = series.x.length <= 40;
      return [{ x: series.x, y: series.y, name: plain(run.label), mode: few ? "lines+markers" : "lines", line: { color: runColour(i), width: 2 }, marker: { size: 5 }, cliponaxis: false, hovertemplate: `%{y:.4g}${opd.several() ? "" : "<extra></extra>"}` }];
    });
    const positive = data.runs.every((run) => !run.series[name] || run.series[name].y.every((y) => y === null || y > 0));
    const made = layout(190);
    if (logarithmic && positive) made.yaxis.type = "log";
    return [traces, made];
  }

  /** Seconds of each phase, stacked, and what the phases leave of the whole step. */
  function phases(i) {
    const { x, seconds } = data.runs[i].phases;
    const names = Object.keys(seconds).filter((name) => name !== "step");
    const columns = names.map((name) => [name, seconds[name]]);
    if (seconds.step) columns.push(["rest of the step", seconds.step.map((whole, k) => Math.max(0, whole - names.reduce((sum, name) => sum + (seconds[name][k] || 0), 0)))]);
    const traces = columns.map(([name, y], k) => ({ x, y, name: plain(name), stackgroup: "one", mode: "lines", line: { width: 0.5, color: css(`--phase-${k % 8}`) }, fillcolor: css(`--phase-${k % 8}`), hovertemplate: "%{y:.3g} s" }));
    const made = layout(300, { showlegend: true, legend: { orientation: "h", y: -0.18, yanchor: "top", traceorder: "normal", font: { size: 11 } } });
    made.yaxis.ticksuffix = " s";
    return [traces, made];
  }

  function describe(name) {
    return data.runs.filter((run) => run.series[name] && run.series[name].y.length).map((run) => `${run.label}: from ${opd.number(run.series[name].y[0])} to ${opd.number(opd.last(run.series[name].y))}`).join("; ");
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const chart = charts.get(entry.target.dataset.name);
      chart.visible = entry.isIntersecting;
      if (chart.visible) draw(chart);
    }
  }, { rootMargin: "300px" });

  function draw(chart) {
    if (!window.Plotly || chart.drawn) return;
    chart.drawn = true;
    const [traces, made] = chart.build();
    window.Plotly.react(chart.node, traces, made, { displayModeBar: false, responsive: true, displaylogo: false });
  }

  /** Charts that are in sight are drawn again now, the others when they come into sight. */
  function redraw() {
    for (const chart of charts.values()) {
      chart.drawn = false;
      if (chart.visible) draw(chart);
    }
  }

  function figure(name, title, unit, about, build, wide) {
    const node = make("div", { class: wide ? "plot wide" : "plot", "data-name": name });
    const label = make("span", { class: "described" });
    const bad = make("span", { class: "bad" });
    charts.set(name, { node, build, visible: false, drawn: false, label, bad });
    watcher.observe(node);
    return make("figure", { class: wide ? "wide" : "", role: "group", "aria-label": title }, make("figcaption", {}, make("strong", {}, title), unit ? make("small", {}, ` ${unit}`) : null, bad, about ? make("small", { class: "about" }, about) : null, label), node);
  }

  function group(key) {
    const id = `curves-${key.replace(/\W/g, "-")}`;
    let grid = document.getElementById(id);
    if (!grid) {
      grid = make("div", { class: "grid", id });
      document.getElementById("curves").append(make("h3", {}, GROUPS[key] || key.replaceAll("_", " ")), grid);
    }
    return grid;
  }

  /** Add the charts of names that are new, say their values in words, and draw again. */
  function refresh() {
    for (const name of new Set(data.runs.flatMap((run) => Object.keys(run.series)))) {
      if (!charts.has(name)) {
        const { title, unit, about } = meaning(name);
        group(name.includes("/") ? name.split("/")[0] : "logged").append(figure(name, title, unit, about, () => curve(name), false));
      }
      const chart = charts.get(name);
      chart.label.textContent = describe(name);
      const bad = data.runs.reduce((sum, run) => sum + (run.series[name] ? run.series[name].not_finite : 0), 0);
      chart.bad.textContent = bad ? ` ${bad} value${bad > 1 ? "s are" : " is"} not finite` : "";
    }
    data.runs.forEach((run, i) => {
      const name = `phases ${i}`;
      if (!charts.has(name) && run.phases.x.length) group("Seconds of a step, by phase").append(figure(name, opd.several() ? run.label : "phases", "", "", () => phases(i), true));
    });
    redraw();
  }

  function start() {
    const box = make("input", { type: "checkbox", onchange: () => { logarithmic = box.checked; redraw(); } });
    const runs = opd.several() ? make("p", { class: "legend" }, data.runs.map((_, i) => opd.runName(i))) : null;
    opd.fill("curves", runs, make("div", { class: "controls" }, make("label", { class: "check" }, box, "logarithmic, where all values are positive")));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    refresh();
  }

  /** A chart of another section: `add` gives its figure, `change` says what it shows from now on. */
  function add(name, title, unit, about) {
    return figure(name, title, unit, about, () => [[], layout(190)], false);
  }

  function change(name, words, build) {
    const chart = charts.get(name);
    Object.assign(chart, { build, drawn: false });
    chart.label.textContent = words;
    if (chart.visible) draw(chart);
  }

  return { start, refresh, redraw, add, change, layout, runColour, plain };
})();
