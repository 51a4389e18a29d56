// A run and its concepts: which codes there are, what they are called, in which order they are gone through.
"use strict";

clvq.runs = (() => {
  const { element, named } = clvq.text;
  const opened = new Map();

  class Run {
    constructor(site, info, overview) {
      this.site = site;
      this.info = info;
      this.id = info.id;
      this.overview = overview;
      this.size = overview.code.length;
      this.place = new Map(overview.code.map((code, place) => [code, place]));
      this.most = overview.uses.reduce((most, uses) => Math.max(most, uses), 1);
      this.labelled = site.classes.length > 0 && overview.label.some((label) => label !== null);
      this.measured = info.effects && overview.effect.some((effect) => effect !== null);
      /** Places in the overview as the table has them: what “previous” and “next” mean. */
      this.order = overview.code.map((_, place) => place).sort((a, b) => overview.uses[b] - overview.uses[a] || a - b);
      this.haystack = null;
    }

    has(code) {
      return this.place.has(code);
    }

    words(code, most = 3) {
      const place = this.place.get(code);
      return place === undefined ? [] : this.overview.words[place].slice(0, most);
    }

    /** A column's value of a code; `null` where there is none. */
    value(column, code) {
      const place = this.place.get(code);
      return place === undefined ? null : (this.overview[column]?.[place] ?? null);
    }

    async concept(code) {
      const place = this.place.get(code);
      if (place === undefined) return null;
      const name = clvq.shard(`${this.id}/concepts`, Math.floor(place / this.info.per_shard), 2);
      const found = (await clvq.load(name))[String(code)];
      if (found === undefined) throw new clvq.Unreadable(`The file data/${name}.js lacks concept ${code}.`);
      return found;
    }

    /** Whether each place has all of the words looked for, or the number of the code. */
    matching(query) {
      const { code, words } = this.overview;
      const terms = query
        .toLowerCase()
        .split(/\s+/)
        .filter((term) => term !== "");
      if (terms.length === 0) return null;
      this.haystack ??= words.map((list) => list.join(" ").toLowerCase());
      return code.map((number, place) =>
        terms.every((term) =>
          /^#?\d+$/.test(term)
            ? String(number) === term.replace("#", "") || this.haystack[place].includes(term)
            : this.haystack[place].includes(term),
        ),
      );
    }

    /** For each place the one of its words that tells it best from other concepts, and how well it does. */
    telling() {
      if (this.told === undefined) {
        const { words, top_share: share } = this.overview;
        const among = new Map();
        for (const list of words) for (const word of new Set(list)) among.set(word, (among.get(word) ?? 0) + 1);
        this.told = words.map((list, place) => {
          const able = list.slice(0, 3).filter((word) => /\p{L}{2}/u.test(word) && !/^[‹<[]/.test(word));
          const rarity = (word) => Math.log(this.size / among.get(word));
          const best = able.reduce(
            (one, word) => (one === null || rarity(word) > 1.2 * rarity(one) ? word : one),
            null,
          );
          return { word: best, weight: best === null ? 0 : rarity(best) ** 3 * (0.2 + (share[place] ?? 0)) };
        });
      }
      return this.told;
    }

    /** The size that 95% of the effects stay below: colours and axes reach so far, and a few do not hide the rest. */
    reach() {
      if (this.reached === undefined) {
        const sizes = this.overview.effect
          .filter((one) => one !== null)
          .map(Math.abs)
          .sort((a, b) => a - b);
        this.reached = sizes.length ? sizes[Math.floor(0.95 * (sizes.length - 1))] || sizes.at(-1) : 0;
      }
      return this.reached;
    }
  }

  /** A run of the site, with its overview loaded. */
  async function open(site, id) {
    const info = site.runs.find((run) => run.id === id);
    if (info === undefined) throw new clvq.Unreadable(`The site has no run “${id}”.`);
    if (!opened.has(id)) opened.set(id, new Run(site, info, await clvq.load(`${id}/overview`)));
    return opened.get(id);
  }

  const address = (run, code) => `#/${run.id}/c/${code}`;

  const swatch = (code) => clvq.theme.tint(element("span", { class: "swatch", "aria-hidden": "true" }), code);

  /** Words one after the other, each isolated. */
  const listed = (words, most = 24) =>
    words.flatMap((word, place) => (place ? [" · ", named(word, most)] : [named(word, most)]));

  /** A concept by its number and words, leading to its page where it has one. */
  function link(run, code, { words = 3, extra = null } = {}) {
    const inner = [
      swatch(code),
      element("span", { class: "code" }, String(code)),
      element("span", { class: "concept-words" }, listed(run.words(code, words))),
      extra,
    ];
    return run.has(code)
      ? element("a", { class: "concept-link", href: address(run, code) }, inner)
      : element(
          "span",
          { class: "concept-link" },
          inner,
          element("span", { class: "note" }, " (not used in training)"),
        );
  }

  return { open, address, swatch, listed, link };
})();
