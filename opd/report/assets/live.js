"use strict";
// Asks `opd watch` for what the run has written since, and shows it.
opd.live = (() => {
  const { data, make } = opd;
  const status = make("p", { class: "live", role: "status" }, "live");
  const EVERY = 2000;

  function merge(run, news) {
    for (const [name, { x, y, not_finite }] of Object.entries(news.series)) {
      const series = (run.series[name] = run.series[name] || { x: [], y: [], not_finite: 0 });
      series.x.push(...x);
      series.y.push(...y);
      series.not_finite += not_finite;
    }
    const { x, seconds } = run.phases;
    for (const phase of new Set([...Object.keys(seconds), ...Object.keys(news.phases.seconds)])) {
      seconds[phase] = seconds[phase] || x.map(() => 0);
      seconds[phase].push(...(news.phases.seconds[phase] || news.phases.x.map(() => 0)));
    }
    x.push(...news.phases.x);
    for (const [source, { total, chunks }] of Object.entries(news.rows)) {
      run.rows[source].chunks.push(...chunks);
      run.rows[source].total += total;
    }
    Object.assign(run, { offsets: news.offsets, facts: news.facts, finished: news.finished, steps: news.steps, maps: news.maps });
  }

  async function poll() {
    const run = data.runs[0];
    let more = false;
    try {
      const answer = await fetch(`data.json?${new URLSearchParams(run.offsets)}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(await answer.text());
      const news = await answer.json();
      if (news.restarted || String(news.generation) !== String(run.generation)) {
        location.reload();
        return;
      }
      more = news.more;
      const changed = String(Object.values(news.offsets)) !== String(Object.values(run.offsets)) || news.finished !== run.finished;
      const rows = Object.values(news.rows).some(({ total }) => total);
      merge(run, news);
      if (changed) {
        opd.drawHeader();
        opd.card.draw();
        opd.curves.refresh();
      }
      if (rows) {
        opd.rollouts.refresh();
        opd.pictures.refresh();
      }
      status.className = "live";
      status.textContent = run.finished ? "finished" : "live";
    } catch (error) {
      status.className = "live lost";
      status.textContent = "opd watch does not answer; it may have ended";
    }
    setTimeout(poll, more ? 0 : EVERY);
  }

  return { status, start: () => setTimeout(poll, EVERY) };
})();
