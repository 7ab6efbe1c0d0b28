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
      const { step, id, length, finished, reward, task, image, means } = chunk.index;
      step.forEach((_, at) => rows.entries.push({
        run: i, step: step[at], id: id[at], length: length[at], finished: finished[at], reward: reward[at], task: task[at], image: image[at], chunk, at,
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

  /** [lowest, 2 %, 98 %, highest] of a value over all rows of `source`. */
  function range(source, name) {
    const found = data.runs.flatMap((run) => run.rows[source].chunks.map((chunk) => chunk.ranges[name]).filter(Boolean));
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
    }));
    for (const [key, column] of columns) {
      if (key === "tokens") eachToken(rows, (row, i) => row.tokens.push(header.strings[column.values[i]]));
      else if (key.startsWith("values.")) {
        const name = key.slice("values.".length);
        eachToken(rows, (row, i) => (row.values[name] = row.values[name] || []).push(real(column, i)));
      } else if (key.endsWith("/count")) ranked(rows, header, columns, key.slice(0, -"/count".length), real);
    }
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

  return { entries, total, valueNames, range, ofRows, load };
})();
