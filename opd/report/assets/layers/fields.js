"use strict";
// Anything that no layer describes, as text.
opd.rowRenderers.fields = (value) => opd.make("pre", { tabindex: "0" }, typeof value === "string" ? value : JSON.stringify(value, null, 1));
