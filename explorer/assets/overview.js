// The first view of a run: its concepts as a map and a table, and how the codebook is doing.
"use strict";

clvq.overview = (() => {
  const { element, named, number, plural } = clvq.text;

  /** Figures with what they mean. */
  function health(rows) {
    return element(
      "dl",
      { class: "tiles" },
      rows.map(([label, value, explanation]) =>
        element(
          "div",
          { class: "tile" },
          element("dt", {}, label),
          element("dd", { class: "value" }, number(value)),
          element("dd", { class: "note" }, explanation),
        ),
      ),
    );
  }

  const paths = (run) => [named(run.info.lower), " to ", named(run.info.upper)];

  function lead(run) {
    const { site, info } = run;
    return element(
      "p",
      { class: "lead" },
      "The model “",
      named(site.made.model, 60),
      "” reads a text as rows of numbers, one for each word or part of a word. ",
      named(info.method, 30),
      ` sorted these rows into ${plural(run.size, "concept")}, on their way from layer `,
      paths(run),
      ". A concept is a set of words, in their sentences, that the model treats alike.",
    );
  }

  /** A few concepts to begin with: those that do most, and those that tell most of a label. */
  function beginnings(run) {
    const { code, effect, effect_low: low, label, purity, uses } = run.overview;
    const places = code.map((_, place) => place);
    const told = run.telling();
    const best = (list, value) => list.sort((a, b) => value(b) - value(a)).slice(0, 4);
    const strong = run.measured
      ? best(
          places.filter((place) => low[place] > 0),
          (place) => effect[place],
        )
      : [];
    const telling = (place) =>
      told[place].weight * Math.sqrt(uses[place]) * (run.labelled ? (purity[place] ?? 0) ** 4 : 1);
    const plain = places.filter((place) => told[place].word !== null && !strong.includes(place));
    const clear = best(
      plain.filter((place) => !run.labelled || label[place] !== null),
      telling,
    );
    const line = (name, list) =>
      list.length === 0
        ? null
        : element(
            "p",
            { class: "begin" },
            element("span", { class: "begin-name" }, name),
            list.map((place) => clvq.runs.link(run, code[place], { words: 2 })),
          );
    return [line("Strongest effect:", strong), line(run.labelled ? "Clear words and label:" : "Clear words:", clear)];
  }

  /** How the map may be coloured. */
  function colourChoice(run, settings, changed) {
    const ways = [
      ["label", "main label", run.labelled],
      ["effect", "effect", run.measured],
    ].filter(([, , there]) => there);
    if (ways.length < 2) return null;
    return element(
      "fieldset",
      { class: "segments" },
      element("legend", {}, "Colour by"),
      ways.map(([value, text]) =>
        element(
          "label",
          {},
          element("input", {
            type: "radio",
            name: "colour",
            value,
            checked: settings.colour === value,
            onchange: () => changed(value),
          }),
          element("span", {}, text),
        ),
      ),
    );
  }

  /** What the columns mean. */
  function reading(run) {
    const term = (name, text) => [element("dt", {}, name), element("dd", {}, text)];
    return element(
      "details",
      { class: "reading" },
      element("summary", {}, "What do the columns mean?"),
      element(
        "dl",
        { class: "terms" },
        term("Uses", "how many rows of the training texts have this concept."),
        term("Top word", "the share of those rows that its most frequent word has: 100% means that it is one word."),
        run.labelled
          ? term(
              "Main label",
              "the label that most of its rows' texts have, and their share. A share near chance means that the " +
                "concept says nothing of the label.",
            )
          : null,
        run.measured
          ? term(
              "Effect",
              "how many percentage points of probability the model's prediction loses, on average, when the concept " +
                "is taken out of its texts while the model runs. " +
                "The line is the 95% interval; where it crosses zero, there may be no effect at all.",
            )
          : null,
      ),
    );
  }

  async function draw(site, [id], query) {
    const run = await clvq.runs.open(site, id);
    const usual = run.labelled ? "label" : run.measured ? "effect" : "none";
    const wanted = query.get("colour");
    const settings = {
      colour: (wanted === "label" && run.labelled) || (wanted === "effect" && run.measured) ? wanted : usual,
      sort: query.get("sort") ?? "-uses",
    };
    const field = element("input", {
      type: "search",
      id: "search",
      placeholder: "a word, or a concept's number",
      autocomplete: "off",
      spellcheck: "false",
      value: query.get("q") ?? "",
    });
    const found = element("p", { class: "note found", role: "status" });
    const map = clvq.map.draw(run, settings);
    const table = clvq.table.draw(run, settings, () =>
      clvq.route.replace({ sort: settings.sort === "-uses" ? null : settings.sort }),
    );
    const legend = element("div", { class: "legend-holder" }, clvq.map.legend(run, settings.colour));
    const relegend = () => legend.replaceChildren(clvq.map.legend(run, settings.colour));
    clvq.theme.listeners.add(relegend);
    clvq.route.leaving(() => clvq.theme.listeners.delete(relegend));

    function search() {
      const matches = run.matching(field.value);
      const shown = table.filter(matches);
      found.textContent =
        matches === null
          ? plural(run.size, "concept")
          : `${plural(shown, "concept")} of ${run.size.toLocaleString("en")}`;
      map.filter(matches);
    }
    let timer = null;
    field.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => {
        search();
        clvq.route.replace({ q: field.value });
      }, 60);
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") document.querySelector("table.concepts tbody a")?.focus();
    });
    clvq.route.leaving(() => clearTimeout(timer));
    search();

    return {
      title: `${run.info.name} – ${site.title}`,
      part: "overview",
      ready: "overview",
      content: [
        element("h1", {}, "Concepts of ", named(run.info.name, 60)),
        lead(run),
        element("div", { class: "beginnings" }, beginnings(run)),
        element(
          "div",
          { class: "controls" },
          element("label", { class: "field grow", for: "search" }, element("span", {}, "Search"), field),
          colourChoice(run, settings, (colour) => {
            settings.colour = colour;
            map.redraw();
            relegend();
            clvq.route.replace({ colour: colour === usual ? null : colour });
          }),
          found,
        ),
        element(
          "div",
          { class: "halves" },
          element(
            "section",
            { class: "card map-card", "aria-labelledby": "map-heading" },
            element("h2", { id: "map-heading" }, "Map"),
            element(
              "p",
              { class: "note" },
              "Each dot is a concept: larger if used more, near others if the model represents them alike. Click " +
                "one to open it; ",
              "drag to move, Ctrl and wheel or the buttons to zoom.",
            ),
            map.holder,
            legend,
          ),
          element(
            "section",
            { class: "card table-card", "aria-labelledby": "table-heading" },
            element("h2", { id: "table-heading" }, "Table"),
            element(
              "p",
              { class: "note" },
              "The same concepts as a list. A click on a heading sorts, one on a row opens.",
            ),
            table.holder,
            reading(run),
          ),
        ),
        element(
          "section",
          { class: "card", "aria-labelledby": "health-heading" },
          element("h2", { id: "health-heading" }, "Health of the codebook"),
          element("p", { class: "note" }, "Whether the concepts are used, and how much of the upper layer they keep."),
          health(run.info.health),
        ),
        made(site, run),
      ],
      placed: () => map.start(),
    };
  }

  /** Where all of it comes from. */
  function made(site, run) {
    return element(
      "p",
      { class: "note made" },
      "From the cache ",
      element("code", {}, String(site.made.cache).slice(0, 12)),
      `, run with seed ${run.info.seed}, by clvq ${site.made.clvq}.`,
    );
  }

  return { draw, health };
})();
