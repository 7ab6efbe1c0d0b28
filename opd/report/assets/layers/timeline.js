"use strict";
// When something happens in a video: true, teacher's and student's interval on a line of seconds, with the frames that
// the student sees above it.
(() => {
  const { make } = opd;
  const BARS = [["true", "true", "true"], ["teacher", "teacher", "teacher"], ["said", "student", "said"]];
  const isInterval = (value) => Array.isArray(value) && value.length === 2 && value.every(Number.isFinite);
  const seconds = (value) => `${opd.number(value)} s`;
  const percent = (value) => `${Math.max(0, Math.min(100, 100 * value)).toFixed(2)}%`;

  /** The frames at their times; at most as many as stand beside each other. */
  function frames(value, duration) {
    const { times, images } = value || {};
    if (!Array.isArray(times) || !Array.isArray(images) || !images.length) return null;
    const last = duration || times[times.length - 1] || 1;
    const width = Math.min(12, 100 / images.length);
    return make("div", { class: "strip" }, images.map((address, i) => {
      const picture = opd.rowRenderers.picture(address, {});
      if (picture.tagName === "IMG") picture.alt = `frame at ${seconds(times[i])}`;
      const node = make("figure", {}, picture, make("figcaption", {}, seconds(times[i])));
      node.style.left = percent((times[i] / last) * (1 - width / 100));
      node.style.width = `${width}%`;
      return node;
    }));
  }

  opd.rowRenderers.timeline = (value, row) => {
    if (!value || typeof value !== "object" || !isInterval(value.true)) return make("pre", {}, JSON.stringify(value, null, 1));
    const known = BARS.map(([key]) => value[key]).filter(isInterval);
    const shown = row.extra && row.extra.frames;
    const times = shown && Array.isArray(shown.times) ? shown.times.filter(Number.isFinite) : [];
    const duration = Number.isFinite(value.duration) && value.duration > 0 ? value.duration : Math.max(...known.flat(), ...times, 1);
    const bars = BARS.filter(([key]) => key in value).map(([key, title, name]) => {
      const line = make("div", { class: `interval ${name}` });
      if (isInterval(value[key]) && value[key][0] < value[key][1]) {
        const bar = make("span", {});
        bar.style.left = percent(value[key][0] / duration);
        bar.style.width = percent((Math.min(value[key][1], duration) - value[key][0]) / duration);
        line.append(bar);
      }
      const told = isInterval(value[key]) ? `${seconds(value[key][0])} to ${seconds(value[key][1])}` : "no interval";
      return [make("span", { class: "who" }, title), line, make("span", { class: "number" }, told)];
    });
    const asked = typeof row.prompt === "string" ? make("p", { class: "asked" }, opd.visible(row.prompt)) : null;
    return make("div", { class: "timeline" }, asked, frames(shown, duration), make("div", { class: "intervals" }, bars.flat()), make("p", { class: "axis" }, make("span", {}, "0 s"), make("span", {}, seconds(duration))));
  };

  // With an interval the frames stand above it already.
  opd.rowRenderers.frames = (value, row) => (row.extra && row.extra.interval ? make("p", { class: "note" }, "shown above the intervals") : frames(value, null) || make("pre", {}, JSON.stringify(value)));
})();
