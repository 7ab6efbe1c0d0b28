"use strict";
// The token view: held-out and training rollouts, each token coloured by one of the row's values, and a panel that
// shows all that is known of the token under the pointer or the keyboard's focus.
opd.visible = (() => {
  const NAMED = { " ": "·", "\n": "↵", "\r": "␍", "\t": "⇥" };
  const HIDDEN = /[\p{C}\p{Z}\ufffd]/u;

  /** A token's text as nodes in which blanks, controls and half characters can be seen. */
  return (text) => {
    if (text === "") return [opd.make("span", { class: "mark" }, "∅")];
    const parts = [];
    let plain = "";
    for (const letter of text) {
      if (!HIDDEN.test(letter)) {
        plain += letter;
        continue;
      }
      if (plain) parts.push(plain);
      plain = "";
      const name = NAMED[letter] || (letter === "\ufffd" ? "�" : `U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
      parts.push(opd.make("span", { class: "mark" }, name));
    }
    return plain ? [...parts, plain] : parts;
  };
})();

opd.rollouts = (() => {
  const { data, make, number } = opd;
  const PER_PAGE = 10;
  const TOKENS_AT_ONCE = 1000;
  const LONG = 400; // letters that are shown without a word about there being more
  const SPECIAL = /^(<[^<>\s]+>|\[[A-Z_]{2,}\])$/;
  const MODES = { held_out: "Held out", training: "Training", pairs: "Before and after", groups: "Groups" };
  const ORDERS = {
    held_out: { first: "as measured", highest: "highest mean first", lowest: "lowest mean first" },
    training: { latest: "latest step first", first: "first step first", highest: "highest mean first", lowest: "lowest mean first" },
    groups: { moved: "most moved first", latest: "latest step first", earliest: "first step first" },
    pairs: { first: "as measured", fall: "largest fall first", rise: "largest rise first" },
  };
  const VERDICTS = {
    right: ["right (reward 1 or more)", ({ reward }) => reward !== null && reward >= 1],
    partly: ["partly right (between 0 and 1)", ({ reward }) => reward !== null && reward > 0 && reward < 1],
    wrong: ["wrong (reward 0 or less)", ({ reward }) => reward !== null && reward <= 0],
    none: ["without a verdict", ({ reward }) => reward === null],
    cut: ["cut off", ({ finished }) => !finished],
  };
  const SHOWS = { both: "text and tokens", text: "text alone", tokens: "tokens alone" };
  const state = {
    mode: "held_out", run: 0, step: "last", order: {}, page: 0, colour: {}, left: "0:first", right: "0:last",
    words: "", verdict: "", from: null, to: null, least: null, most: null, shows: "both", own: false,
  };
  const shown = new WeakMap(); // listbox of tokens -> {row, entry}
  let turn = 0;

  const source = () => (state.mode === "training" || state.mode === "groups" ? "training" : "held_out");
  const order = () => state.order[state.mode] || Object.keys(ORDERS[state.mode])[0];
  const layer = (name) => data.layers.find((one) => one.place === "colour" && one.reads === `values.${name}`) || { title: name.replaceAll("_", " "), renderer: "automatic", unit: "", about: "", hue: "orange" };

  function colourName() {
    const names = opd.rows.valueNames(source());
    return names.includes(state.colour[source()]) ? state.colour[source()] : names[0];
  }

  /** What paints a token of run `run` by its value: on one scale for all runs, or on the run's own. */
  function painter(run) {
    const name = colourName();
    const found = layer(name || "");
    const scale = opd.scales[found.renderer] || opd.scales.automatic;
    const domain = scale.domain(name ? opd.rows.range(source(), name, state.own ? run : null) : [0, 0, 0, 0]);
    const root = scale.root && !(domain[0] < 0 && domain[1] > 0);
    const strength = (value) => {
      const share = Math.max(-1, Math.min(1, value / domain[1]));
      return root ? Math.sign(share) * Math.sqrt(Math.abs(share)) : share;
    };
    return { name, layer: found, scale, domain, strength, middle: root ? domain[1] / 4 : (domain[0] + domain[1]) / 2 };
  }

  // ---- which rows ----

  const steps = (run) => [...new Set(opd.rows.entries(run, "held_out").map((entry) => entry.step))].sort((a, b) => a - b);

  function stepOf(run, wanted) {
    const all = steps(run);
    return wanted === "first" ? all[0] : wanted === "last" ? opd.last(all) : Number(wanted);
  }

  /** Held-out entries of one step by prompt id; a step that was measured twice counts once, the later time. */
  function measured(run, wanted) {
    const step = stepOf(run, wanted);
    return new Map(opd.rows.entries(run, "held_out").filter((entry) => entry.step === step).map((entry) => [entry.id, entry]));
  }

  /** The list in the chosen order; rows without the value come last. */
  function ordered(found, value) {
    if (order() === "latest") return found.sort((a, b) => b.step - a.step);
    const sign = { highest: -1, rise: -1, lowest: 1, fall: 1 }[order()];
    if (!sign) return found;
    const keyed = found.map((item) => [value(item) === null ? Infinity : sign * value(item), item]);
    return keyed.sort(([a], [b]) => (a === b ? 0 : a - b)).map(([, item]) => item);
  }

  /** Training rollouts of one prompt at one step, where there are several. */
  function groups() {
    const found = new Map();
    for (const entry of opd.rows.entries(state.run, "training")) {
      const key = `${entry.step} ${entry.id}`;
      if (!found.has(key)) found.set(key, { step: entry.step, members: [] });
      found.get(key).members.push(entry);
    }
    return [...found.values()].filter(({ members }) => members.length > 1);
  }

  /** The largest offset of a member, and how many members weigh nothing. */
  const moved = ({ members }) => [Math.max(...members.map((entry) => Math.abs(entry.mean("offset") || 0))), members.filter((entry) => entry.mean("weight") === 0).length];

  function orderedGroups() {
    const found = groups();
    if (order() !== "moved") return found.sort((a, b) => (order() === "latest" ? b.step - a.step : a.step - b.step));
    return found.map((one) => [moved(one), one]).sort(([a], [b]) => b[0] - a[0] || b[1] - a[1]).map(([, one]) => one);
  }

  /** The rollouts of an item: one, two beside each other, or a group. */
  const entriesOf = (item) => item.members || (item.left ? [item.left, item.right] : [item]);

  /** Which items the filters leave: some rollout of an item has to have the words and the verdict that were asked for. */
  async function filtered(all) {
    const verdict = VERDICTS[state.verdict];
    const training = source() === "training";
    const fits = (entry) => (!verdict || verdict[1](entry))
      && (!training || ((state.from === null || entry.step >= state.from) && (state.to === null || entry.step <= state.to)))
      && (state.least === null || (entry.reward !== null && entry.reward >= state.least))
      && (state.most === null || (entry.reward !== null && entry.reward <= state.most));
    const left = all.filter((item) => entriesOf(item).some(fits));
    const words = state.words.trim().toLowerCase();
    if (!words) return left;
    const has = await Promise.all(left.map(async (item) => (await Promise.all(entriesOf(item).map(opd.rows.text))).some((text) => text.includes(words))));
    return left.filter((_, i) => has[i]);
  }

  function items() {
    const name = colourName();
    if (state.mode === "groups") return orderedGroups();
    if (state.mode === "pairs") {
      const [left, right] = [state.left, state.right].map((side) => measured(...parseSide(side)));
      const pairs = [...left.values()].filter((entry) => right.has(entry.id)).map((entry) => ({ left: entry, right: right.get(entry.id) }));
      return ordered(pairs, (pair) => pair.right.mean(name) - pair.left.mean(name));
    }
    const found = state.mode === "held_out" ? [...measured(state.run, state.step).values()] : [...opd.rows.entries(state.run, "training")];
    return ordered(found, (entry) => entry.mean(name));
  }

  const parseSide = (side) => [Number(side.split(":")[0]), side.split(":")[1]];

  // ---- controls ----

  const tabs = make("div", { class: "tabs", role: "group", "aria-label": "Which rollouts" }, Object.entries(MODES).map(([mode, title]) => make("button", { type: "button", "data-mode": mode, onclick: () => set({ mode, page: 0 }) }, title)));
  const select = (title, change) => {
    const node = make("select", { "data-control": title, onchange: () => change(node.value) });
    const label = make("label", {}, make("span", {}, title), node);
    return { node, label };
  };
  const numeric = (name, title, key) => {
    const node = make("input", { type: "number", step: "any", "data-control": name, "aria-label": name, placeholder: title, onchange: () => set({ [key]: node.value === "" ? null : Number(node.value), page: 0 }) });
    return node;
  };
  const runBox = select("run", (value) => set({ run: Number(value), page: 0, step: "last" }));
  const stepBox = select("step", (value) => set({ step: value, page: 0 }));
  const leftBox = select("left", (value) => set({ left: value, page: 0 }));
  const rightBox = select("right", (value) => set({ right: value, page: 0 }));
  const orderBox = select("order", (value) => set({ order: { ...state.order, [state.mode]: value }, page: 0 }));
  const colourBox = select("colour", (value) => set({ colour: { ...state.colour, [source()]: value } }));
  const scaleBox = select("scale", (value) => set({ own: value === "own" }));
  const showsBox = select("show", (value) => set({ shows: value }));
  const verdictBox = select("verdict", (value) => set({ verdict: value, page: 0 }));
  let typing = null;
  const search = make("input", { type: "search", "data-control": "search", placeholder: "in prompts and answers", oninput: () => {
    clearTimeout(typing);
    typing = setTimeout(() => set({ words: search.value, page: 0 }), 150);
  } });
  const searchLabel = make("label", { class: "search" }, make("span", {}, "search"), search);
  const range = (title, first, second) => make("div", { class: "range", role: "group", "aria-label": title }, make("span", {}, title), first, make("span", {}, "to"), second);
  const stepsBox = range("steps", numeric("first step", "first", "from"), numeric("last step", "last", "to"));
  const rewardBox = range("reward", numeric("least reward", "least", "least"), numeric("most reward", "most", "most"));
  const clear = make("button", { type: "button", class: "quiet", onclick: () => {
    for (const node of [search, ...stepsBox.querySelectorAll("input"), ...rewardBox.querySelectorAll("input")]) node.value = "";
    set({ words: "", verdict: "", from: null, to: null, least: null, most: null, page: 0 });
  } }, "clear filters");
  const matched = make("p", { class: "note", role: "status" });
  const legend = make("div", { class: "scale" });
  const note = make("p", { class: "note" });
  const list = make("div", { class: "list" });
  const panel = make("aside", { class: "panel", "aria-label": "The token" });
  const pagers = [pager(), pager()];

  function set(changes) {
    Object.assign(state, changes);
    show();
  }

  function options(box, wanted, value) {
    const same = box.node.options.length === wanted.length && wanted.every(([key, title], i) => box.node.options[i].value === key && box.node.options[i].textContent === title);
    if (!same) box.node.replaceChildren(...wanted.map(([key, title]) => make("option", { value: key }, title)));
    box.node.value = value;
  }

  function drawControls() {
    for (const tab of tabs.children) {
      tab.setAttribute("aria-pressed", String(tab.dataset.mode === state.mode));
      if (tab.dataset.mode === "groups") tab.hidden = state.mode !== "groups" && !data.runs.some((_, i) => opd.rows.entries(i, "training").some(({ step, id }, k, all) => k && all[k - 1].step === step && all[k - 1].id === id));
    }
    runBox.label.hidden = state.mode === "pairs" || !opd.several();
    options(runBox, data.runs.map((run, i) => [String(i), run.label]), String(state.run));
    stepBox.label.hidden = state.mode !== "held_out";
    const all = steps(state.run);
    options(stepBox, [["last", all.length ? `last (${opd.last(all)})` : "last"], ...all.map((step) => [String(step), String(step)])], state.step);
    for (const [box, side] of [[leftBox, "left"], [rightBox, "right"]]) {
      box.label.hidden = state.mode !== "pairs";
      options(box, data.runs.flatMap((run, i) => {
        const before = opd.several() ? `${run.label}, ` : "";
        const known = steps(i);
        return [[`${i}:first`, `${before}first step (${known[0] ?? "none"})`], [`${i}:last`, `${before}last step (${opd.last(known) ?? "none"})`], ...known.slice(1, -1).map((step) => [`${i}:${step}`, `${before}step ${step}`])];
      }), state[side]);
    }
    options(orderBox, Object.entries(ORDERS[state.mode]), order());
    options(showsBox, Object.entries(SHOWS), state.shows);
    scaleBox.label.hidden = !opd.several() || !colourName();
    options(scaleBox, [["shared", "one for all runs"], ["own", "each run’s own"]], state.own ? "own" : "shared");
    const known = data.runs.flatMap((_, i) => opd.rows.entries(i, source()));
    const verdicts = Object.entries(VERDICTS).filter(([name, [, fits]]) => name === state.verdict || (known.some(fits) && !known.every(fits)));
    verdictBox.label.hidden = !verdicts.length;
    options(verdictBox, [["", "all"], ...verdicts.map(([name, [title]]) => [name, title])], state.verdict);
    const rewards = new Set(known.map(({ reward }) => reward).filter((reward) => reward !== null));
    rewardBox.hidden = ![...rewards].some((reward) => reward !== 0 && reward !== 1);
    stepsBox.hidden = source() !== "training" || new Set(known.map(({ step }) => step)).size < 2;
    clear.hidden = !filtering();
    options(colourBox, opd.rows.valueNames(source()).map((name) => [name, layer(name).title]), colourName());
    colourBox.label.hidden = !colourName();
    drawLegend();
    const thinned = data.runs.map((_, i) => [opd.rows.entries(i, source()).length, opd.rows.total(i, source()), i]).filter(([have, all]) => have < all);
    const told = thinned.map(([have, all, i]) => `${opd.several() ? `${data.runs[i].label}: ` : ""}${have.toLocaleString("en")} of ${all.toLocaleString("en")} rollouts are in this page, evenly chosen, to keep it small.`);
    note.textContent = [...told, ...(source() === "held_out" ? data.runs.map(untold) : [])].filter(Boolean).join(" ");
    note.hidden = !note.textContent;
  }

  const filtering = () => Boolean(state.words.trim() || state.verdict || [state.from, state.to, state.least, state.most].some((one) => one !== null));

  /** What there is to say of a run whose teacher's own answers are not, or not all, in the page. */
  function untold(run, i) {
    const ids = new Map(); // prompt -> whether its teacher's answer is known; pictures and episodes have none
    for (const { id, taught, image } of opd.rows.entries(i, "held_out")) if (taught !== null && !image) ids.set(id, ids.get(id) || taught);
    const answered = [...ids.values()].filter(Boolean).length;
    if (!run.taught || !ids.size || answered === ids.size) return "";
    const before = opd.several() ? `${run.label}: ` : "";
    if (answered) return `${before}The teacher was asked for its own answer to ${answered} of ${ids.size} prompts, once; evaluation.teacher_answers: true has it answer all.`;
    return `${before}The teacher’s own answers are not in this run: it is no model of the student’s tokenizer on the student’s device, or the recipe says evaluation.teacher_answers: false.`;
  }

  function drawLegend() {
    const { name, layer: found } = painter(0);
    legend.className = `scale hue-${found.hue}`;
    legend.hidden = !name || state.shows === "text";
    const unit = found.unit ? ` ${found.unit}` : "";
    const one = (run) => {
      const { domain: [from, to], middle } = painter(run);
      return make("span", { class: `ramp ${from < 0 && to > 0 ? "both" : ""}` }, state.own ? opd.runName(run) : null, make("span", {}, number(from)), make("span", { class: "gradient", "aria-hidden": "true" }, make("i", {}, number(middle))), make("span", {}, `${number(to)}${unit}`));
    };
    legend.replaceChildren(...(state.own ? data.runs.map((_, i) => one(i)) : [one(0)]), make("small", {}, `${found.about}${found.about ? ". " : ""}Values beyond the scale keep its last colour.`));
  }

  function pager() {
    const previous = make("button", { type: "button", "aria-label": "previous page", onclick: () => turnTo(state.page - 1) }, "‹");
    const next = make("button", { type: "button", "aria-label": "next page", onclick: () => turnTo(state.page + 1) }, "›");
    const field = make("input", { type: "number", min: 1, "aria-label": "page", onchange: () => turnTo(Number(field.value) - 1) });
    const of = make("span");
    return { node: make("div", { class: "pager" }, previous, field, of, next), previous, next, field, of };
  }

  function turnTo(page) {
    if (list.getBoundingClientRect().top < 0) document.getElementById("rollouts").scrollIntoView();
    set({ page: Number.isInteger(page) ? page : 0 });
  }

  function drawPagers(count) {
    const pages = Math.max(1, Math.ceil(count / PER_PAGE));
    state.page = Math.max(0, Math.min(state.page, pages - 1));
    for (const { node, previous, next, field, of } of pagers) {
      node.hidden = pages < 2;
      previous.disabled = state.page === 0;
      next.disabled = state.page === pages - 1;
      field.max = pages;
      if (document.activeElement !== field) field.value = state.page + 1;
      of.textContent = `of ${pages.toLocaleString("en")} · ${count.toLocaleString("en")} ${state.mode === "groups" ? "prompts" : "rollouts"}`;
    }
  }

  // ---- rows ----

  async function show() {
    const mine = ++turn;
    drawControls();
    const paint = painter;
    let cards;
    try {
      const whole = items();
      const all = await filtered(whole);
      if (mine !== turn) return; // another choice was made meanwhile
      matched.textContent = filtering() ? `${all.length.toLocaleString("en")} of ${whole.length.toLocaleString("en")} ${state.mode === "groups" ? "prompts" : "rollouts"} match` : "";
      drawPagers(all.length);
      const page = all.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE);
      const names = state.mode === "groups" ? compared(whole) : null;
      cards = await Promise.all(page.map((item) => (item.left ? pairCard(item, paint) : item.members ? groupCard(item, paint, names) : card(item, paint))));
    } catch (error) {
      cards = [make("p", { class: "note" }, `These rollouts cannot be decoded here (${error.message}). A browser of 2023 or later can.`)];
    }
    if (mine !== turn) return; // another choice was made meanwhile
    const empty = filtering() ? "No rollout matches." : data.live ? "None yet." : "This run has none.";
    list.replaceChildren(...(cards.length ? cards : [make("p", { class: "empty" }, empty)]));
    performance.mark("opd rollouts shown");
  }

  /** Text boxes beside each other: what was said, and by whom. */
  const answer = (who, text, kind = "") => make("div", { class: `answer ${kind}` }, make("h4", {}, who), make("div", { class: "said", tabindex: text.length > LONG ? "0" : null }, text || make("span", { class: "empty" }, "(nothing)")));

  /** What stands above the tokens: the prompt, and what the teacher reads instead of it and says to it itself. */
  function asked(row, told) {
    return make("div", { class: "asked" }, prompt("prompt", row.prompt),
      told.prompt === null ? null : make("details", { class: "read" }, make("summary", {}, Array.isArray(told.prompt) ? `what the teacher reads instead: ${told.prompt.length} messages` : "what the teacher reads instead"), prompt("", told.prompt)));
  }

  const teachers = (entry, told) => (told.answer === null ? null : answer(`teacher’s own answer, greedy${told.step !== entry.step ? `, asked at step ${told.step}` : ""}`, told.answer, "teachers"));
  const plain = (row) => row.text ?? row.tokens.join("");
  const isText = (row) => !["image", "episode"].some((key) => key in row.extra);

  async function card(entry, paint) {
    const [row, told] = await Promise.all([opd.rows.load(entry), opd.rows.taught(entry)]);
    const answers = state.shows === "tokens" || !isText(row) ? null : make("div", { class: "answers" }, answer("student’s answer", plain(row)), teachers(entry, told));
    return make("article", { class: "card" }, meta(entry, paint(entry.run), entry.id), asked(row, told), answers, completion(row, entry, paint(entry.run)));
  }

  async function pairCard({ left, right }, paint) {
    const [before, after, told] = await Promise.all([opd.rows.load(left), opd.rows.load(right), opd.rows.taught(right)]);
    const side = (row, entry) => make("div", { class: "side" }, meta(entry, paint(entry.run)), state.shows === "tokens" || !isText(row) ? null : answer("student’s answer", plain(row)), completion(row, entry, paint(entry.run)));
    return make("article", { class: "card" }, make("p", { class: "meta" }, make("span", {}, left.id)), asked(before, told), state.shows === "tokens" ? null : teachers(right, told), make("div", { class: "pair" }, side(before, left), side(after, right)));
  }

  /** Names of one number a row: those that all members of a group share, and those that tell them apart. */
  function compared(all) {
    const shared = (name) => all.every(({ members }) => members.every((entry) => entry.mean(name) === members[0].mean(name)));
    const names = opd.rows.ofRows("training");
    return { shared: names.filter(shared), own: names.filter((name) => !shared(name)) };
  }

  /** A prompt with several rollouts of one step: what they got and what was done to each, then their texts beside each
   *  other, those with the highest reward at the left. */
  async function groupCard({ step, members }, paint, { shared, own }) {
    const rewards = members.map(({ reward }) => reward ?? -Infinity);
    const best = Math.max(...rewards);
    const differ = rewards.some((reward) => reward !== best);
    const left = ({ reward }, i) => (differ ? (reward ?? -Infinity) === best : i < members.length / 2);
    const sorted = [...members].sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity));
    const [rows, told] = await Promise.all([Promise.all(sorted.map((entry) => opd.rows.load(entry))), opd.rows.taught(sorted[0])]);
    const said = rows.some((row) => row.extra.shaped);
    const title = (name) => make("th", { scope: "col", class: "number", title: layer(name).about }, layer(name).title);
    const head = make("tr", {}, make("th", { scope: "col" }, ""), make("th", { scope: "col", class: "number" }, "reward"), own.map(title), said ? make("th", { scope: "col" }, "what was done to it") : null);
    const body = sorted.map((entry, i) => make("tr", {}, make("th", { scope: "row" }, `answer ${i + 1}`), make("td", { class: "number" }, number(entry.reward)), own.map((name) => make("td", { class: "number" }, number(entry.mean(name)))), said ? make("td", { class: "what" }, rows[i].extra.shaped || "nothing") : null));
    const about = make("p", { class: "meta" }, opd.several() ? opd.runName(members[0].run) : null, make("span", {}, `step ${step}`), make("span", {}, members[0].id), members[0].task && make("span", {}, members[0].task),
      shared.filter((name) => members[0].mean(name) !== null).map((name) => make("span", { title: layer(name).about }, `${layer(name).title} ${number(members[0].mean(name))}`)));
    const side = (wanted) => make("div", {}, sorted.flatMap((entry, i) => left(entry, i) !== wanted ? [] : [make("div", { class: "side" }, make("p", { class: "meta" }, chip(entry.reward), make("span", {}, `answer ${i + 1}`), make("span", {}, `reward ${number(entry.reward)}`), entry.finished ? null : make("span", {}, "cut off")), state.shows === "tokens" ? null : answer("student’s answer", plain(rows[i])), completion(rows[i], entry, paint(entry.run), ["shaped"]))]));
    const table = opd.scroller("What was done to each answer", make("table", { class: "members" }, make("thead", {}, head), make("tbody", {}, body)));
    return make("article", { class: "card" }, about, asked(rows[0], told), table, make("div", { class: "pair" }, side(true), side(false)));
  }

  /** What a verifier said, in a word and a colour; other rewards than 0 and 1 stand as numbers in the line. */
  const chip = (reward) => (reward === 1 ? make("span", { class: "chip good" }, "right") : reward === 0 ? make("span", { class: "chip bad" }, "wrong") : null);

  /** One line about a rollout; beside another of the same prompt it needs no name. */
  function meta(entry, paint, name = null) {
    const mean = paint.name ? entry.mean(paint.name) : null;
    return make("p", { class: "meta" }, chip(entry.reward),
      opd.several() ? opd.runName(entry.run) : null, make("span", {}, `step ${entry.step}`), name && make("span", {}, name), entry.task && make("span", {}, entry.task),
      make("span", {}, `${entry.length} token${entry.length === 1 ? "" : "s"}`), entry.finished ? null : make("span", {}, "cut off"),
      entry.reward === null || chip(entry.reward) ? null : make("span", {}, `reward ${number(entry.reward)}`), mean === null ? null : make("span", {}, `mean ${paint.layer.title} ${opd.short(mean)}`));
  }

  /** A prompt: text, or messages of {role, content}. */
  function prompt(title, value) {
    const text = (content) => (typeof content === "string" ? content : content === null || content === undefined ? "" : JSON.stringify(content));
    const messages = Array.isArray(value) && value.every((one) => one && typeof one === "object" && "content" in one) ? value.map((one) => [text(one.role), text(one.content)]) : [["", text(value)]];
    const whole = make("div", { class: "prompt" }, messages.map(([role, content]) => make("p", {}, role ? make("b", {}, `${role} `) : null, content)));
    const head = title ? make("h4", {}, title) : null;
    if (messages.reduce((sum, [, content]) => sum + content.length, 0) < LONG || !title) return make("div", {}, head, whole);
    whole.classList.add("cut");
    const more = make("button", { type: "button", class: "more", "aria-expanded": "false", onclick: () => more.setAttribute("aria-expanded", String(!whole.classList.toggle("cut"))) }, "whole prompt");
    return make("div", {}, head, whole, more);
  }

  function completion(row, entry, paint, without = []) {
    const box = make("div", { class: `tokens hue-${paint.layer.hue}`, role: "listbox", "aria-orientation": "horizontal", "aria-label": `completion of ${entry.id} at step ${entry.step}, ${row.tokens.length} tokens; arrow keys move` });
    shown.set(box, { row, entry });
    const add = (from, to) => {
      for (let i = from; i < Math.min(to, row.tokens.length); i++) token(box, row, i, paint);
    };
    add(0, TOKENS_AT_ONCE);
    const rest = row.tokens.length - TOKENS_AT_ONCE;
    const more = rest > 0 ? make("button", { type: "button", class: "more", onclick: () => { add(TOKENS_AT_ONCE, row.tokens.length); more.remove(); } }, `${rest.toLocaleString("en")} more tokens`) : null;
    if (state.shows === "text" && isText(row)) box.hidden = true;
    const blocks = Object.entries(row.extra).filter(([key]) => !tokenLayer(key) && !without.includes(key)).map(([key, value]) => block(key, value, row));
    return make("div", { class: "completion" }, box, box.hidden ? null : more, blocks);
  }

  const tokenLayer = (key) => data.layers.find((one) => one.place === "token" && one.reads === key);

  /** What a row layer, or nobody, says of another key of the row. */
  function block(key, value, row) {
    const found = data.layers.find((one) => one.place === "row" && one.reads === key);
    const draw = (found && opd.rowRenderers[found.renderer]) || opd.rowRenderers.fields;
    const drawn = draw(value, row);
    return make("details", { class: "block", open: drawn.tagName !== "PRE" }, make("summary", {}, found ? found.title : key.replaceAll("_", " ")), drawn);
  }

  function token(box, row, i, paint) {
    const text = row.tokens[i];
    const value = paint.name && row.values[paint.name] ? row.values[paint.name][i] : null;
    const strength = value === null ? 0 : paint.strength(value);
    const node = make("span", { class: `t${SPECIAL.test(text) ? " special" : ""}${strength < 0 ? " negative" : ""}${value === null ? " unknown" : ""}`, role: "option", tabindex: i ? "-1" : "0", "data-i": i, "aria-selected": "false" }, opd.visible(text));
    node.setAttribute("aria-label", `${text.trim() || JSON.stringify(text)}, ${paint.layer.title} ${number(value)}`);
    node.style.setProperty("--strength", Math.abs(strength).toFixed(3));
    box.append(node);
    if (text.includes("\n")) box.append(make("br"));
  }

  // ---- the token under the pointer or the focus ----

  function inspect(node) {
    const box = node.parentElement;
    const { row, entry } = shown.get(box);
    const i = Number(node.dataset.i);
    for (const old of list.querySelectorAll('[aria-selected="true"]')) old.setAttribute("aria-selected", "false");
    node.setAttribute("aria-selected", "true");
    const text = row.tokens[i];
    const paint = painter(entry.run);
    const values = Object.entries(row.values).map(([name, all]) => {
      const found = layer(name);
      const scale = opd.scales[found.renderer];
      const words = all[i] !== null && scale && scale.note ? make("small", {}, ` ${scale.note(all[i])}`) : null;
      return make("tr", { class: name === paint.name ? "chosen" : "", title: found.about }, make("th", { scope: "row" }, found.title), make("td", { class: "number" }, number(all[i]), words));
    });
    const blocks = data.layers.filter((one) => one.place === "token" && one.reads in row.extra && opd.tokenRenderers[one.renderer]).map((one) => make("div", { class: "more-of" }, make("h3", {}, one.title), opd.tokenRenderers[one.renderer](row.extra[one.reads], i, row)));
    panel.replaceChildren(
      make("button", { type: "button", class: "close", "aria-label": "close", onclick: close }, "×"),
      make("p", { class: "meta" }, make("span", {}, `token ${i + 1} of ${row.tokens.length}`), make("span", {}, `step ${entry.step}`), make("span", {}, entry.id)),
      make("p", { class: "big" }, make("code", {}, opd.visible(text))),
      make("table", { class: "values" }, make("tbody", {}, values)), ...blocks);
    panel.classList.add("open");
    // On a narrow page the panel lies over the lower half; the token must not lie under it.
    if (getComputedStyle(panel).position === "fixed") node.scrollIntoView({ block: "nearest" });
  }

  function close() {
    panel.classList.remove("open");
    const node = list.querySelector('[aria-selected="true"]');
    if (node) node.setAttribute("aria-selected", "false");
  }

  function move(node, to) {
    if (!to) return;
    for (const old of to.parentElement.querySelectorAll('[tabindex="0"]')) old.tabIndex = -1;
    to.tabIndex = 0;
    to.focus({ preventScroll: false });
  }

  /** The token above or below: in the next line of this completion, or in the next completion. */
  function vertical(node, direction) {
    const here = node.getBoundingClientRect();
    const middle = here.left + here.width / 2;
    const all = [...list.querySelectorAll(".t")];
    let best = null;
    let line = null;
    for (let i = all.indexOf(node) + direction; all[i]; i += direction) {
      const there = all[i].getBoundingClientRect();
      if (Math.abs(there.top - here.top) < 4) continue;
      if (line === null) line = there.top;
      if (Math.abs(there.top - line) >= 4) break;
      const distance = Math.abs(there.left + there.width / 2 - middle);
      if (!best || distance < best.distance) best = { node: all[i], distance };
    }
    return best && best.node;
  }

  function onKey(event) {
    const node = event.target.closest(".t");
    if (event.key === "Escape") close();
    if (!node || event.ctrlKey || event.metaKey || event.altKey) return;
    const tokens = [...node.parentElement.querySelectorAll(".t")];
    const at = tokens.indexOf(node);
    const to = {
      ArrowRight: () => tokens[at + 1], ArrowLeft: () => tokens[at - 1], Home: () => tokens[0], End: () => opd.last(tokens),
      ArrowDown: () => vertical(node, 1), ArrowUp: () => vertical(node, -1),
    }[event.key];
    if (!to) return;
    event.preventDefault();
    move(node, to());
  }

  function start() {
    for (const kind of ["pointerover", "focusin", "click"]) {
      list.addEventListener(kind, (event) => {
        const node = event.target.closest && event.target.closest(".t");
        if (node) inspect(node);
      });
    }
    list.addEventListener("keydown", onKey);
    // On a narrow page the panel lies over the others' place too; it goes when the rollouts are out of sight.
    new IntersectionObserver(([{ isIntersecting }]) => isIntersecting || panel.classList.remove("open")).observe(list);
    panel.append(make("p", { class: "empty" }, "Point at a token, or reach it with Tab and the arrow keys: its values, and what student and teacher would rather have said, show here."));
    if (!opd.rows.valueNames("held_out").length && opd.rows.valueNames("training").length) state.mode = "training";
    const boxes = [runBox, stepBox, leftBox, rightBox, orderBox, showsBox, colourBox, scaleBox].map((box) => box.label);
    opd.fill("rollouts", tabs, make("div", { class: "controls" }, boxes), make("div", { class: "controls filters", role: "search", "aria-label": "Filters" }, searchLabel, verdictBox.label, stepsBox, rewardBox, clear), matched, legend, note, pagers[0].node, make("div", { class: "tokenview" }, list, panel), pagers[1].node);
    return show();
  }

  /** New rows have come: show them, unless somebody is reading a token of the old ones. */
  function refresh() {
    if (list.matches(":hover") || list.contains(document.activeElement)) drawControls();
    else show();
  }

  return { start, refresh };
})();
