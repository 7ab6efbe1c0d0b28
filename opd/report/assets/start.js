"use strict";
opd.drawTheme();
opd.drawHeader();
opd.card.draw();
opd.curves.start();
opd.drawRecipe();
opd.drawEnvironment();
opd.pictures.refresh();
// The charting library is by far the largest script. It lies in the page as text and starts when the rest can be seen.
opd.rollouts.start().finally(() => requestAnimationFrame(() => setTimeout(() => {
  document.head.append(opd.make("script", {}, document.getElementById("charts").textContent));
  opd.curves.redraw();
  performance.mark("opd charts ready");
})));
if (opd.data.live) opd.live.start();
