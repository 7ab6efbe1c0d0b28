"use strict";
// Who wrote this token, in rows where the environment wrote some: an author for each token.
opd.tokenRenderers.author = (authors, i) => opd.make("p", {}, String(authors[i] ?? ""));
