"use strict";
// Everything logged, one small chart a name, runs overlaid; and the phases of a step stacked. Drawn when scrolled to.
opd.curves = (() => {
  const { data, make, meaning, number } = opd;
  const GROUPS = { held_out: "Held out", train: "Training" };
  const charts = new Map(); // name -> {node, traces, layout, visible, drawn}
  // What is asked first of a run, and what last.
  const FIRST = ["train/loss", "train/reward", "train/length", "train/truncated"];
  const LAST = ["train/gradient_norm", "train/learning_rate", "train/rollout_gap", "train/positions", "train/sampled_tokens", "train/teacher_tokens", "train/cpu_seconds", "train/tokens_per_second"];
  const FEW = 40; // points that are marked one by one
  let logarithmic = false;
  let smoothing = 0;

  const still = make("div", { class: "stills" }); // what has no chart
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

  /** Exponential moving average of known values, of which the share `smoothing` is of those before; the first ones
   *  are weighed as many as there are, so that no curve begins at 0. */
  function smooth(values) {
    let sum = 0;
    let weight = 0;
    return values.map((y) => {
      if (y === null) return null;
      sum = smoothing * sum + (1 - smoothing) * y;
      weight = smoothing * weight + (1 - smoothing);
      return sum / weight;
    });
  }

  function curve(name) {
    const smoothed = smoothing > 0 && !name.startsWith("held_out/");
    const traces = data.runs.flatMap((run, i) => {
      const series = run.series[name];
      if (!series) return [];
      const few = series.x.length <= FEW && !smoothed;
      const raw = { x: series.x, y: series.y, mode: "lines", line: { color: runColour(i), width: 1 }, opacity: 0.3, hoverinfo: "skip", cliponaxis: false };
      const shown = { x: series.x, y: smoothed ? smooth(series.y) : series.y, name: plain(run.label), mode: few ? "lines+markers" : "lines", line: { color: runColour(i), width: 2 }, marker: { size: 5 }, cliponaxis: false, hovertemplate: `%{y:.4g}${opd.several() ? "" : "<extra></extra>"}` };
      return smoothed ? [raw, shown] : [shown];
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

  const inRun = (run, name) => (run.series[name] && run.series[name].y.some((y) => y !== null) ? run.series[name] : null);
  const legend = { orientation: "h", y: -0.25, yanchor: "top", traceorder: "normal", font: { size: 11 } };

  /** Several names of one run together; a line with `low` and `high` has the range between them shaded. */
  function together(run, chart) {
    const traces = chart.lines.flatMap(({ reads, title, low, high, dashed }, k) => {
      const series = inRun(run, reads);
      if (!series) return [];
      const colour = runColour(k);
      const edge = (name, extra) => ({ x: run.series[name].x, y: run.series[name].y, mode: "lines", line: { width: 0 }, showlegend: false, legendgroup: title, hoverinfo: "skip", ...extra });
      const band = low && high && inRun(run, low) && inRun(run, high) ? [edge(low, {}), edge(high, { fill: "tonexty", fillcolor: `${colour}33` })] : [];
      const few = series.x.length <= 40 && !dashed;
      return [...band, { x: series.x, y: series.y, name: plain(title), legendgroup: title, mode: few ? "lines+markers" : "lines", line: { color: dashed ? css("--quiet") : colour, width: 2, dash: dashed ? "dash" : "solid" }, marker: { size: 5 }, cliponaxis: false, hovertemplate: "%{y:.4g}" }];
    });
    return [traces, layout(300, { showlegend: true, legend })];
  }

  /** Names of a run that are `family`, perhaps a tag, and a number: tag to [number, last value]. */
  function counted(run, family) {
    const found = new Map();
    for (const [name, series] of Object.entries(run.series)) {
      const rest = name.startsWith(family) ? /^(?:(.*)\/)?(\d+)$/.exec(name.slice(family.length)) : null;
      if (rest) found.set(rest[1] || "", [...(found.get(rest[1] || "") || []), [Number(rest[2]), opd.last(series.y)]]);
    }
    for (const pairs of found.values()) pairs.sort(([a], [b]) => a - b);
    return found;
  }

  function bars(run, chart, tag) {
    const notes = new Map(chart.notes ? counted(run, chart.notes).get(tag) || [] : []);
    const traces = chart.families.map(([family, title], k) => {
      const pairs = counted(run, family).get(tag) || [];
      const text = k === chart.families.length - 1 ? pairs.map(([x, y]) => (y && notes.has(x) ? `×${number(notes.get(x))}` : "")) : null;
      return { type: "bar", x: pairs.map(([x]) => x), y: pairs.map(([, y]) => y), name: plain(title), marker: { color: runColour(k) }, text, textposition: "outside", cliponaxis: false, hovertemplate: "%{y:.4g}" };
    });
    const made = layout(300, { showlegend: true, legend, barmode: "group" });
    Object.assign(made.xaxis, { title: { ...made.xaxis.title, text: chart.axis }, dtick: 1, showgrid: false });
    return [traces, made];
  }

  const GROUPS_OF_MAPS = ["not reliable: the student was not asked", "reliable", "taken"];

  /** A round of a curriculum: each prompt by how right the teacher is and how far the student is from it. */
  function map(run, round) {
    const found = run.maps.find((one) => one.round === round);
    const known = found.disagreement.filter((y) => y !== null);
    // Who was not asked stands on a line of its own below the others.
    const below = known.length ? Math.min(...known) - 0.08 * (Math.max(...known) - Math.min(...known) || 1) : 0;
    const traces = GROUPS_OF_MAPS.map((name, group) => {
      const here = found.group.map((g, i) => (g === group ? i : -1)).filter((i) => i >= 0);
      const y = here.map((i) => found.disagreement[i]);
      return { type: "scatter", mode: "markers", x: here.map((i) => found.reliability[i]), y: y.map((v) => (v === null ? below : v)), name, marker: { size: 6, opacity: 0.7, symbol: group ? "circle" : "line-ns-open", color: group === 2 ? runColour(1) : group ? runColour(0) : css("--quiet") }, hovertemplate: `teacher %{x:.3g}, disagreement %{y:.3g}<extra>${name}</extra>` };
    }).filter((trace) => trace.x.length);
    const made = layout(300, { showlegend: true, legend, hovermode: "closest" });
    made.xaxis.title.text = "mean reward of the teacher";
    made.xaxis.rangemode = "normal";
    made.yaxis.title = { text: "disagreement", font: { size: 11 } };
    return [traces, made];
  }

  const mapWords = ({ round, judged, reliable, drawn, group }) => `round ${round}: ${judged.toLocaleString("en")} prompts, ${reliable.toLocaleString("en")} of them reliable, ${drawn.toLocaleString("en")} taken${group.length < judged ? `; ${group.length.toLocaleString("en")} are shown` : ""}`;

  /** Figures of several names together, and the names that stand in them. */
  function composed() {
    const figures = [];
    const names = new Set();
    data.runs.forEach((run, i) => data.charts.forEach((chart, k) => {
      const more = opd.several() ? `, ${run.label}` : "";
      if (chart.kind === "bars") {
        const families = [...chart.families.map(([family]) => family), ...(chart.notes ? [chart.notes] : [])];
        for (const tag of counted(run, families[0]).keys()) figures.push({ name: `chart ${k} ${i} ${tag}`, title: `${chart.title}${tag ? `: ${tag}` : ""}${more}`, chart, build: () => bars(run, chart, tag), words: () => chart.families.map(([family, title]) => `${title}: ${(counted(run, family).get(tag) || []).map(([x, y]) => `${number(y)} with ${x}`).join(", ")}`).join("; ") });
        for (const family of families) for (const [tag, pairs] of counted(run, family)) for (const [x] of pairs) names.add(`${family}${tag ? `${tag}/` : ""}${x}`);
      } else if (inRun(run, chart.lines[0].reads)) {
        figures.push({ name: `chart ${k} ${i}`, title: `${chart.title}${more}`, chart, build: () => together(run, chart), words: () => chart.lines.filter(({ reads }) => inRun(run, reads)).map(({ reads, title }) => `${title}: from ${number(run.series[reads].y[0])} to ${number(opd.last(run.series[reads].y))}`).join("; ") });
        for (const { reads, low, high } of chart.lines) for (const name of [reads, low, high]) names.add(name);
      }
    }));
    data.runs.forEach((run, i) => (run.maps || []).forEach(({ round }) => figures.push({
      name: `map ${i} ${round}`, title: `prompts by reliability and disagreement, round ${round}${opd.several() ? `, ${run.label}` : ""}`,
      chart: { unit: "", about: "the teacher is right on the right, and the student far from it above" },
      build: () => map(data.runs[i], round), words: () => mapWords(data.runs[i].maps.find((one) => one.round === round)),
    })));
    return { figures, names };
  }

  // ---- what has a chart of its own ----

  const SAME = 1e-5; // of the larger of two values: what rounding alone makes of one number
  const equal = (a, b) => a === b || (a !== null && b !== null && Math.abs(a - b) <= SAME * Math.max(Math.abs(a), Math.abs(b)));
  const ENOUGH = 5; // steps at which two curves that are in proportion are so by no chance

  /** How many times as much `name` is as `other`, at every step of every run; null where that changes. */
  function times(name, other) {
    let found = null;
    for (const run of data.runs) {
      const [one, two] = [run.series[other], run.series[name]];
      if (Boolean(one) !== Boolean(two)) return null;
      if (!one) continue;
      if (one.x.length !== two.x.length || !one.x.every((x, i) => x === two.x[i])) return null;
      const at = one.y.findIndex((y) => y);
      if (at < 0 || two.y[at] === null) return null;
      if (found === null) found = two.y[at] / one.y[at];
      if (!one.y.every((y, i) => equal(y === null ? null : y * found, two.y[i]))) return null;
      if (!equal(found, 1) && one.x.length < ENOUGH) return null;
    }
    return found;
  }

  const unchanging = (name) => data.runs.every((run) => !run.series[name] || (!run.series[name].not_finite && run.series[name].y.every((y) => equal(y, run.series[name].y[0]))));
  const measuredTwice = (name) => name.startsWith("held_out/") && data.runs.every((run) => !run.series[name] || run.series[name].x.length < 3);

  /** Which names have a chart, each with the others that are the same numbers in all runs, or so many times the same; those that never change; and
   *  those of which the result above says all, as they were measured before and after alone. */
  function sorted(taken) {
    const place = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) - FIRST.length : LAST.indexOf(name) + 1);
    const all = [...new Set(data.runs.flatMap((run) => Object.keys(run.series)))].filter((name) => !taken.has(name) && !name.startsWith("report/")).sort((a, b) => place(a) - place(b));
    const charted = new Map();
    const constant = [];
    const above = [];
    for (const name of all) {
      if (measuredTwice(name)) above.push(name);
      else if (unchanging(name)) constant.push(name);
      else {
        const twin = [...charted.keys()].find((other) => times(name, other) > 0);
        if (twin) charted.get(twin).push(name);
        else charted.set(name, []);
      }
    }
    return { charted, constant, above };
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
    const width = wide === true ? "wide" : wide || "";
    const node = make("div", { class: width ? "plot wide" : "plot", "data-name": name });
    const label = make("span", { class: "described" });
    const bad = make("span", { class: "bad" });
    const also = make("small", { class: "about" });
    watcher.observe(node);
    const whole = make("figure", { class: width, role: "group", "aria-label": title }, make("figcaption", {}, make("strong", {}, title), unit ? make("small", {}, ` ${unit}`) : null, bad, about ? make("small", { class: "about" }, about) : null, also, label), node);
    charts.set(name, { node, build, visible: false, drawn: false, label, bad, also, whole });
    return whole;
  }

  function group(key) {
    const id = `curves-${key.replace(/\W/g, "-")}`;
    let grid = document.getElementById(id);
    if (!grid) {
      grid = make("div", { class: "grid", id });
      document.getElementById("curves").insertBefore(make("h3", {}, GROUPS[key] || key.replaceAll("_", " ")), still);
      document.getElementById("curves").insertBefore(grid, still);
    }
    return grid;
  }

  /** Add the charts of names that are new, say their values in words, and draw again. */
  function refresh() {
    const { figures, names } = composed();
    for (const { name, title, chart, build, words } of figures) {
      if (!charts.has(name)) group("Together").append(figure(name, title, chart.unit, chart.about, build, "half"));
      charts.get(name).label.textContent = words();
    }
    const { charted, constant, above } = sorted(names);
    for (const [name, twins] of charted) {
      if (!charts.has(name)) {
        const { title, unit, about } = meaning(name);
        group(name.includes("/") ? name.split("/")[0] : "logged").append(figure(name, title, unit, about, () => curve(name), false));
      }
      const chart = charts.get(name);
      chart.single = true;
      chart.label.textContent = describe(name);
      const many = (twin) => { const factor = times(twin, name); return equal(factor, 1) ? meaning(twin).title : `${number(factor)} × this is ${meaning(twin).title}`; };
      chart.also.textContent = twins.length ? `also: ${twins.map(many).join("; ")}` : "";
      const bad = data.runs.reduce((sum, run) => sum + (run.series[name] ? run.series[name].not_finite : 0), 0);
      chart.bad.textContent = bad ? ` ${bad} value${bad > 1 ? "s are" : " is"} not finite` : "";
    }
    // While a run goes on, two names may part, or come to be the same.
    for (const [name, chart] of charts) if (chart.single) chart.whole.hidden = !charted.has(name);
    const value = (name, run) => (run.series[name] ? number(run.series[name].y[0]) : "–");
    still.replaceChildren(
      ...(constant.length ? [make("h3", {}, "Logged, and the same at every step"), make("dl", { class: "still" }, constant.map((name) => make("div", { title: meaning(name).about }, make("dt", {}, meaning(name).title), make("dd", {}, data.runs.map((run) => value(name, run)).join(" · "), meaning(name).unit ? make("small", {}, ` ${meaning(name).unit}`) : null))))] : []),
      ...(above.length ? [make("p", { class: "note" }, "Held-out prompts were measured before and after training alone: the result on top says it all. ", make("code", {}, "evaluation.every"), " measures in between, and makes curves of it.")] : []));
    data.runs.forEach((run, i) => {
      const name = `phases ${i}`;
      if (!charts.has(name) && run.phases.x.length) group("Seconds of a step, by phase").append(figure(name, opd.several() ? run.label : "phases", "", "", () => phases(i), true));
    });
    redraw();
  }

  function start() {
    const box = make("input", { type: "checkbox", onchange: () => { logarithmic = box.checked; redraw(); } });
    const told = make("output", {}, "none");
    const slider = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, "data-control": "smoothing", "aria-label": "smoothing of training curves", oninput: () => { smoothing = Number(slider.value); told.textContent = smoothing ? smoothing.toFixed(2) : "none"; redraw(); } });
    const runs = opd.several() ? make("p", { class: "legend" }, data.runs.map((_, i) => opd.runName(i))) : null;
    const save = make("button", { type: "button", "data-control": "csv", onclick: () => opd.save(`${data.runs.map(({ label }) => label.replace(/[^\w.-]+/g, "_")).join("+").slice(0, 100)}.csv`, "text/csv", opd.card.csv()) }, "Save as CSV");
    opd.fill("curves", runs, make("div", { class: "controls" }, make("label", { class: "check" }, "smoothing", slider, told), make("label", { class: "check" }, box, "logarithmic, where all values are positive"), save), still);
    opd.onColours(redraw);
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
