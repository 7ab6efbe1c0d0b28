"use strict";
// The pictures of a prompt, in the order in which they stand there.
opd.rowRenderers.pictures = (addresses, row) => {
  const { make } = opd;
  const shown = (Array.isArray(addresses) ? addresses : [addresses]).map((address) => opd.rowRenderers.picture(address, row));
  shown.forEach((one, i) => {
    if (one.tagName === "IMG") one.alt = `picture ${i + 1} of the prompt`;
  });
  return make("div", { class: "pictures" }, shown);
};
