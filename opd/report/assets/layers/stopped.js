"use strict";
// Where a watch ended a rollout while it was written, and why.
opd.rowRenderers.stopped = (reason, row) => opd.make("p", {}, `behind token ${row.tokens.length}: ${String(reason)}`);
