"use strict";
// An episode of a policy that acts: its pictures, played or stepped through, and at each decision the chosen values of
// the actions beside the expert's, with the divergence over the decisions as a curve.
opd.rowRenderers.episode = (episode, row) => {
  const { make } = opd;
  if (typeof episode !== "object" || episode === null) return make("pre", {}, String(episode));
  const frames = (Array.isArray(episode.frames) ? episode.frames : []).map((address, i) => {
    const image = opd.rowRenderers.picture(address, row);
    if (image.tagName === "IMG") image.alt = `picture ${i + 1} of the episode`;
    return image;
  });
  const chunk = Math.max(1, Number(episode.chunk) || 1);
  const dimensions = Math.max(1, Number(episode.dimensions) || 1);
  const decisions = Math.ceil(row.tokens.length / (chunk * dimensions));
  const steps = Math.max(1, Number(episode.steps) || 1);
  const expert = Array.isArray(episode.expert) ? episode.expert : null;
  const column = row.values && (row.values.reverse_kl || row.values.divergence);
  const means = column ? [...Array(decisions)].map((_, i) => {
    const found = Array.from(column).slice(i * chunk * dimensions, (i + 1) * chunk * dimensions).filter((value) => value !== null && Number.isFinite(value));
    return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : 0;
  }) : [];

  const screen = make("div", { class: "episode-screen" });
  const words = make("p", { class: "note", role: "status" });
  const table = make("table", {});
  const slider = make("input", { type: "range", min: "0", max: String(Math.max(frames.length - 1, decisions - 1, 0)), value: "0", "aria-label": "step of the episode", oninput: () => show(Number(slider.value)) });
  const button = make("button", { type: "button", onclick: () => (timer ? stop() : play()) }, "play");
  let timer = null;

  const curve = () => {
    const most = Math.max(...means, 1e-9);
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    const set = (node, facts) => Object.entries(facts).forEach(([name, value]) => node.setAttribute(name, String(value)));
    set(svg, { viewBox: "0 0 200 44", width: 200, height: 44, role: "img", "aria-label": `divergence from the teacher at each of ${decisions} decisions, at most ${most.toFixed(3)} nats a token` });
    const line = document.createElementNS(ns, "polyline");
    const x = (i) => (decisions > 1 ? (198 * i) / (decisions - 1) + 1 : 100);
    set(line, { points: means.map((value, i) => `${x(i)},${42 - (40 * value) / most}`).join(" "), fill: "none", stroke: "currentColor" });
    svg.append(line);
    const mark = document.createElementNS(ns, "line");
    set(mark, { y1: 0, y2: 44, stroke: "currentColor", "stroke-dasharray": "2 2" });
    svg.append(mark);
    return { svg, move: (i) => set(mark, { x1: x(i), x2: x(i) }), most };
  };
  const drawn = means.length ? curve() : null;

  function show(place) {
    const last = Number(slider.max);
    const step = last ? Math.round((place * (steps - 1)) / last) : 0;
    const decision = Math.min(Math.max(0, decisions - 1), Math.floor(step / chunk));
    slider.value = String(place);
    if (frames.length) screen.replaceChildren(frames[Math.min(frames.length - 1, Math.round((place * (frames.length - 1)) / Math.max(1, last)))]);
    const from = step * dimensions;
    const cells = (values) => [...Array(dimensions)].map((_, d) => make("td", {}, String(values[from + d] ?? "")));
    table.replaceChildren(
      make("tr", {}, make("th", {}, "chosen"), cells(row.tokens)),
      ...(expert ? [make("tr", {}, make("th", {}, "expert"), cells(expert.map((value) => (value >= 0 ? `+${value.toFixed(2)}` : value.toFixed(2)))))] : []),
    );
    const far = means.length ? `, ${means[decision].toFixed(3)} nats a token from the teacher` : "";
    words.textContent = `step ${step + 1} of ${steps}, decision ${decision + 1} of ${decisions}${far}`;
    if (drawn) drawn.move(decision);
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = "play";
  }
  function play() {
    if (Number(slider.value) >= Number(slider.max)) slider.value = "0";
    button.textContent = "stop";
    timer = setInterval(() => {
      const next = Number(slider.value) + 1;
      // One that left the page plays no more.
      if (next > Number(slider.max) || !slider.isConnected) return stop();
      return show(next);
    }, 120);
  }
  show(0);
  return make("div", { class: "episode" }, make("p", {}, episode.success ? "success" : "no success"), screen, make("div", {}, button, " ", slider), words, table, drawn ? make("figure", {}, drawn.svg, make("figcaption", { class: "note" }, "divergence from the teacher by decision")) : "");
};
