"use strict";
// A picture of a row: a `data:` address, as every image of this page must be. Any other text stays text.
opd.rowRenderers.picture = (address, row) => {
  const { make } = opd;
  if (typeof address !== "string" || !/^data:image\/(png|jpeg|webp);base64,[A-Za-z0-9+/=]*$/.test(address)) return make("pre", {}, String(address));
  return make("img", { class: "picture", src: address, alt: typeof row.prompt === "string" ? `drawn for: ${row.prompt}` : "drawn picture", decoding: "async" });
};
