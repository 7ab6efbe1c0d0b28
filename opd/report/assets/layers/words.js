"use strict";
// A sentence about the row.
opd.rowRenderers.words = (text) => opd.make("p", {}, String(text));
