"use strict";
// Rollouts: what each run has, and the decoding of a chunk when one of its rows is shown. Format: opd/report/rows.py.
opd.rows = (() => {
  const { data } = opd;
  const MISSING = -(2 ** 31);
  const decoded = new Map(); // chunk -> promise of its rows, the latest used last
  const KEPT = 48;

  /** Entries of `source` ("held_out" or "training") of run `i`: {step, id, length, finished, reward, task, image, ...}. */
  function entries(i, source) {
    const rows = data.runs[i].rows[source];
    rows.entries = rows.entries || [];
    for (rows.indexed = rows.indexed || 0; rows.indexed < rows.chunks.length; rows.indexed++) {
      const chunk = rows.chunks[rows.indexed];
      const { step, id, length, finished, reward, task, image, taught, read, means } = chunk.index;
      step.forEach((_, at) => rows.entries.push({
        run: i, step: step[at], id: id[at], length: length[at], finished: finished[at], reward: reward[at], task: task[at], image: image[at], taught: taught[at], read: read[at], chunk, at,
        mean: (name) => (means[name] ? means[name][at] : null),
      }));
    }
    return rows.entries;
  }

  function total(i, source) {
    return data.runs[i].rows[source].total;
  }

  /** Names of the values by token that some row of `source` has, over all runs. */
  function valueNames(source) {
    return [...new Set(data.runs.flatMap((run) => run.rows[source].chunks.flatMap((chunk) => Object.keys(chunk.ranges))))];
  }

  /** [lowest, 2 %, 98 %, highest] of a value over all rows of `source`, of all runs or of one. */
  function range(source, name, of = null) {
    const found = data.runs.filter((_, i) => of === null || i === of).flatMap((run) => run.rows[source].chunks.map((chunk) => chunk.ranges[name]).filter(Boolean));
    if (!found.length) return [0, 0, 0, 0];
    return [0, 1, 2, 3].map((k) => (k < 2 ? Math.min : Math.max)(...found.map((one) => one[k])));
  }

  /** Names of the values that are one number a row, the same at all its tokens, and not the same in all rows. */
  function ofRows(source) {
    const chunks = data.runs.flatMap((run) => run.rows[source].chunks);
    return valueNames(source).filter((name) => {
      const [lowest, , , highest] = range(source, name);
      return lowest < highest && chunks.every((chunk) => !chunk.ranges[name] || chunk.of_rows.includes(name));
    });
  }

  async function unpack(chunk) {
    const packed = Uint8Array.from(atob(chunk.data), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const size = new DataView(bytes.buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
    let place = 4 + size;
    const columns = new Map();
    for (const { key, count, scale } of header.columns) {
      const [a, b, c, d] = [0, 1, 2, 3].map((plane) => bytes.subarray(place + plane * count, place + (plane + 1) * count));
      columns.set(key, { scale, values: Int32Array.from({ length: count }, (_, i) => a[i] | (b[i] << 8) | (c[i] << 16) | (d[i] << 24)) });
      place += 4 * count;
    }
    return split(chunk, header, columns);
  }

  function split(chunk, header, columns) {
    const real = ({ values, scale }, i) => (values[i] === MISSING ? null : values[i] / scale);
    const rows = chunk.index.length.map((length, i) => ({
      prompt: header.prompts[header.prompt[i]], text: header.text[i], extra: header.extra[i], tokens: [], values: {}, length,
      teacherAnswer: header.teacher_answer[i], teacherPrompt: header.teacher_prompt[i] === null ? null : header.prompts[header.teacher_prompt[i]],
    }));
    for (const [key, column] of columns) {
      if (key === "tokens") eachToken(rows, (row, i) => row.tokens.push(header.strings[column.values[i]]));
      else if (key.startsWith("values.")) {
        const name = key.slice("values.".length);
        eachToken(rows, (row, i) => (row.values[name] = row.values[name] || []).push(real(column, i)));
      } else if (key.endsWith("/count")) ranked(rows, header, columns, key.slice(0, -"/count".length), real);
    }
    // A number is how many of the last tokens are not in the text, which the others are, one behind the other.
    for (const row of rows) if (typeof row.text === "number") row.text = row.tokens.slice(0, row.tokens.length - row.text).join("");
    return rows;
  }

  function eachToken(rows, take) {
    let i = 0;
    for (const row of rows) for (let t = 0; t < row.length; t++) take(row, i++);
  }

  /** `{side: for each token [[text, number], ...]}` back from its three columns a side. */
  function ranked(rows, header, columns, stem, real) {
    const cut = stem.lastIndexOf("/");
    const [key, side] = [stem.slice(0, cut), stem.slice(cut + 1)];
    const [counts, texts, numbers] = ["count", "text", "number"].map((part) => columns.get(`${stem}/${part}`));
    let at = 0;
    eachToken(rows, (row, i) => {
      const pairs = [];
      for (let k = 0; k < counts.values[i]; k++, at++) pairs.push([header.strings[texts.values[at]], real(numbers, at)]);
      row.extra[key] = row.extra[key] || {};
      (row.extra[key][side] = row.extra[key][side] || []).push(pairs);
    });
  }

  /** The whole row of an entry. */
  async function load(entry) {
    const { chunk } = entry;
    const rows = decoded.get(chunk) || unpack(chunk);
    decoded.delete(chunk);
    decoded.set(chunk, rows);
    if (decoded.size > KEPT) decoded.delete(decoded.keys().next().value);
    return (await rows)[entry.at];
  }

  /** What a teacher reads of the prompt of an entry and what it answers to it itself, wherever a row says so: it is
   *  written once, beside the first measurement. {prompt, answer, step}; null for what is not known. */
  async function taught(entry) {
    const held = [entry, ...entries(entry.run, "held_out").filter(({ id }) => id === entry.id)];
    const of = async (key, name) => {
      // The last one up to this step: a teacher that answers at each measurement may follow the student.
      const found = held.filter((one) => one[key]);
      const at = found.includes(entry) ? entry : found.filter(({ step }) => step <= entry.step).pop() || found[0];
      return at ? [(await load(at))[name], at.step] : [null, null];
    };
    const [[prompt], [answer, step]] = await Promise.all([of("read", "teacherPrompt"), of("taught", "teacherAnswer")]);
    return { prompt, answer, step };
  }

  const texts = new Map(); // chunk -> lower-case texts of its rows

  /** The lower-case text of an entry that a search looks through: its prompt, its answer and its id. */
  async function text(entry) {
    const { chunk } = entry;
    if (!texts.has(chunk)) {
      texts.set(chunk, unpack(chunk).then((rows) => rows.map((row, at) => [chunk.index.id[at], typeof row.prompt === "string" ? row.prompt : JSON.stringify(row.prompt), row.text ?? row.tokens.join("")].join("\n").toLowerCase())));
    }
    return (await texts.get(chunk))[entry.at];
  }

  return { entries, total, valueNames, range, ofRows, load, taught, text };
})();
