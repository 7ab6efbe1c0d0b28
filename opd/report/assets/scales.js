"use strict";
// Colour scales. `domain(range)` gives the two values that the legend shows, from no colour to full colour, where range
// is [lowest, 2 %, 98 %, highest] of all values; a value of the other sign than the second one takes the other colour.
// `root` says that colour grows with the square root: a few tokens are far from all others, and a linear scale would show
// nothing else. `note(value)` may add to a value in words.
Object.assign(opd.scales, {
  /** Nothing to much: 0 has no colour. */
  amount: { root: true, domain: ([, , high, highest]) => [0, high > 0 ? high : highest > 0 ? highest : 1] },
  /** Expected to surprising: 0 has no colour, the lowest values the strongest. */
  log_probability: {
    root: true,
    domain: ([lowest, low]) => [0, low < 0 ? low : lowest < 0 ? lowest : -1],
    note: (value) => `p = ${opd.number(Math.exp(value))}`,
  },
  /** Two directions around zero. */
  signed: {
    domain: ([, low, high]) => {
      const reach = Math.max(Math.abs(low), Math.abs(high)) || 1;
      return [-reach, reach];
    },
  },
  /** A share between 0 and 1. */
  share: { domain: () => [0, 1] },
  /** One of the above, by the values' signs. */
  automatic: {
    root: true,
    domain: (range) => (range[0] >= 0 ? opd.scales.amount : range[3] <= 0 ? opd.scales.log_probability : opd.scales.signed).domain(range),
  },
});
