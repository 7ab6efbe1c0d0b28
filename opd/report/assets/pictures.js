"use strict";
// Held-out pictures before and after, by task and prompt, and what is measured of them: rewards over the training
// steps, and the values of each of the sampler's steps. The section shows when a row has a picture.
opd.pictures = (() => {
  const { data, make, number } = opd;
  const PER_PAGE = 24;
  const ORDERS = { first: "as measured", rise: "largest rise of reward first", fall: "largest fall of reward first" };
  const state = { run: 0, task: "", before: "first", after: "last", order: "first", shown: PER_PAGE };
  let turn = 0;
  let built = null;

  const entries = (run) => opd.rows.entries(run, "held_out").filter((entry) => entry.image);
  const taskOf = (entry) => entry.task || "";
  const tasks = () => [...new Set(data.runs.flatMap((_, i) => entries(i).map(taskOf)))].sort();
  const steps = (run) => [...new Set(entries(run).map((entry) => entry.step))].sort((a, b) => a - b);
  const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
  const rewards = (list) => list.map((entry) => entry.reward).filter((reward) => reward !== null);

  function stepOf(run, wanted) {
    const all = steps(run);
    return wanted === "first" ? all[0] : wanted === "last" ? opd.last(all) : Number(wanted);
  }

  /** Entries of one step by prompt id, of the chosen task. */
  function measured(run, wanted) {
    const step = stepOf(run, wanted);
    return new Map(entries(run).filter((entry) => entry.step === step && (!state.task || taskOf(entry) === state.task)).map((entry) => [entry.id, entry]));
  }

  function pairs() {
    const [before, after] = [measured(state.run, state.before), measured(state.run, state.after)];
    const found = [...before.values()].filter((entry) => after.has(entry.id)).map((entry) => [entry, after.get(entry.id)]);
    const sign = { rise: -1, fall: 1 }[state.order];
    const gain = ([left, right]) => (left.reward === null || right.reward === null ? null : right.reward - left.reward);
    if (!sign) return found;
    return found.sort((a, b) => (gain(a) === null) - (gain(b) === null) || sign * (gain(a) - gain(b)));
  }

  // ---- what stays ----

  function build() {
    const select = (title, key) => {
      const node = make("select", { onchange: () => set({ [key]: key === "run" ? Number(node.value) : node.value, shown: PER_PAGE }) });
      return { node, label: make("label", {}, `${title} `, node) };
    };
    const boxes = { run: select("run", "run"), task: select("task", "task"), before: select("before", "before"), after: select("after", "after"), order: select("order", "order") };
    const grid = make("div", { class: "pictures" });
    const words = make("p", { class: "note", role: "status" });
    const more = make("button", { type: "button", onclick: () => set({ shown: state.shown + PER_PAGE }) });
    const charts = make("div", { class: "grid" });
    opd.fill("pictures", make("div", { class: "controls" }, Object.values(boxes).map((box) => box.label)), words, grid, more, charts);
    return { boxes, grid, words, more, charts, named: new Set() };
  }

  function set(changes) {
    Object.assign(state, changes);
    refresh();
  }

  function options(box, wanted, value) {
    const same = box.node.options.length === wanted.length && wanted.every(([key, title], i) => box.node.options[i].value === key && box.node.options[i].textContent === title);
    if (!same) box.node.replaceChildren(...wanted.map(([key, title]) => make("option", { value: key }, title)));
    box.node.value = String(value);
  }

  function drawControls() {
    const { run, task, before, after, order } = built.boxes;
    run.label.hidden = !opd.several();
    options(run, data.runs.map((one, i) => [String(i), one.label]), state.run);
    task.label.hidden = tasks().length < 2;
    options(task, [["", "all"], ...tasks().filter(Boolean).map((name) => [name, name])], state.task);
    const all = steps(state.run);
    for (const box of [before, after]) options(box, [["first", `first step (${all[0] ?? "none"})`], ["last", `last step (${opd.last(all) ?? "none"})`], ...all.slice(1, -1).map((step) => [String(step), `step ${step}`])], state[box === before ? "before" : "after"]);
    options(order, Object.entries(ORDERS), state.order);
  }

  // ---- the grid ----

  async function card([left, right]) {
    const rows = await Promise.all([opd.rows.load(left), opd.rows.load(right)]);
    const prompt = typeof rows[0].prompt === "string" ? rows[0].prompt : JSON.stringify(rows[0].prompt);
    const side = (row, entry) => {
      const words = `step ${entry.step}${entry.reward === null ? "" : `, reward ${number(entry.reward)}`}`;
      const image = opd.rowRenderers.picture(row.extra.image, row);
      if (image.tagName === "IMG") image.alt = `${prompt}, ${words}`;
      return make("figure", {}, image, make("figcaption", {}, words));
    };
    return make("article", { class: "drawn", "aria-label": prompt }, make("p", {}, prompt), make("div", {}, side(rows[0], left), side(rows[1], right)));
  }

  async function drawGrid(mine) {
    const all = pairs();
    const parts = [];
    for (const name of [...new Set(all.map(([left]) => taskOf(left)))]) {
      const [before, after] = [0, 1].map((side) => mean(rewards(all.filter((pair) => taskOf(pair[0]) === name).map((pair) => pair[side]))));
      if (before !== null) parts.push(`${name || "all prompts"}: mean reward ${number(before)} before, ${number(after)} after`);
    }
    built.words.textContent = parts.join("; ");
    let cards;
    try {
      cards = await Promise.all(all.slice(0, state.shown).map(card));
    } catch (error) {
      cards = [make("p", { class: "note" }, `These pictures cannot be decoded here (${error.message}). A browser of 2023 or later can.`)];
    }
    if (mine !== turn) return;
    built.grid.replaceChildren(...cards);
    const rest = all.length - state.shown;
    built.more.hidden = rest <= 0;
    built.more.textContent = `${rest.toLocaleString("en")} more`;
  }

  // ---- the curves ----

  function chart(name, title, unit, about, words, build) {
    if (!built.named.has(name)) {
      built.named.add(name);
      built.charts.append(opd.curves.add(`pictures ${name}`, title, unit, about));
    }
    opd.curves.change(`pictures ${name}`, words, build);
  }

  const axes = (title) => {
    const made = opd.curves.layout(190);
    made.xaxis.title.text = title;
    made.xaxis.rangemode = "normal";
    return made;
  };
  const line = (x, y, name, colour, dash = "solid") => ({ x, y, name: opd.curves.plain(name), mode: "lines+markers", line: { color: colour, width: 2, dash }, marker: { size: 5 }, cliponaxis: false, hovertemplate: "%{y:.4g}" });

  /** Mean reward of each task by training step. */
  function drawRewards(name) {
    const lines = data.runs.map((run, i) => {
      const here = entries(i).filter((entry) => taskOf(entry) === name && entry.reward !== null);
      const x = [...new Set(here.map((entry) => entry.step))].sort((a, b) => a - b);
      return [i, x, x.map((step) => mean(rewards(here.filter((entry) => entry.step === step))))];
    }).filter(([, x]) => x.length);
    if (!lines.length) return;
    const words = lines.map(([i, , y]) => `${data.runs[i].label}: from ${number(y[0])} to ${number(opd.last(y))}`).join("; ");
    chart(`reward ${name}`, `reward${name ? ` of ${name}` : ""}`, "", "mean of the held-out pictures in this page", words, () => [lines.map(([i, x, y]) => line(x, y, data.runs[i].label, opd.curves.runColour(i))), axes("step")]);
  }

  /** Mean of each value by step of the sampler, over the pictures of the chosen task, before and after. */
  async function drawSamplerSteps(mine) {
    const lines = new Map();
    for (let i = 0; i < data.runs.length; i++) {
      for (const [side, wanted] of [["before", "first"], ["after", "last"]]) {
        const rows = await Promise.all([...measured(i, i === state.run ? state[side] : wanted).values()].map(opd.rows.load));
        for (const name of new Set(rows.flatMap((row) => Object.keys(row.values)))) {
          const length = Math.max(...rows.map((row) => row.length));
          const y = Array.from({ length }, (_, k) => mean(rows.map((row) => (row.values[name] || [])[k]).filter((value) => value !== null && value !== undefined)));
          if (!lines.has(name)) lines.set(name, []);
          lines.get(name).push([i, side, y.map((_, k) => k + 1), y]);
        }
      }
    }
    if (mine !== turn) return;
    for (const [name, found] of lines) {
      const known = data.layers.find((layer) => layer.reads === `values.${name}`) || { title: name.replaceAll("_", " "), unit: "" };
      const words = found.map(([i, side, , y]) => `${opd.several() ? `${data.runs[i].label} ` : ""}${side}: from ${number(y[0])} to ${number(opd.last(y))}`).join("; ");
      chart(`value ${name}`, `${known.title} by step of the sampler`, known.unit, "mean of the pictures of this task; dotted before, solid after", words, () => [found.map(([i, side, x, y]) => line(x, y, `${opd.several() ? `${data.runs[i].label}, ` : ""}${side}`, opd.curves.runColour(i), side === "before" ? "dot" : "solid")), axes("step of the sampler")]);
    }
  }

  /** Show what there is; nothing without pictures. */
  async function refresh() {
    if (!data.runs.some((_, i) => entries(i).length)) return;
    const mine = ++turn;
    document.getElementById("pictures").hidden = document.querySelector('a[href="#pictures"]').hidden = false;
    built = built || build();
    drawControls();
    for (const name of tasks()) drawRewards(name);
    await drawGrid(mine);
    if (mine === turn) await drawSamplerSteps(mine);
    performance.mark("opd pictures shown");
  }

  return { refresh };
})();
