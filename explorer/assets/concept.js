// One concept: what it means, where it stands, what it does.
"use strict";

clvq.concept = (() => {
  const { element, named, piece, short, count, percent, points, number, plural } = clvq.text;
  const { className } = clvq.describe;
  const CONTEXT = 160;

  const card = (id, heading, note, ...content) =>
    element(
      "section",
      { class: `card ${id}`, "aria-labelledby": `${id}-heading` },
      element("h2", { id: `${id}-heading` }, heading),
      note ? element("p", { class: "note" }, note) : null,
      content,
    );

  function tile(label, value, note) {
    return element(
      "div",
      { class: "tile" },
      element("dt", {}, label),
      element("dd", { class: "value" }, value),
      note ? element("dd", { class: "note" }, note) : null,
    );
  }

  function tiles(run, code, concept) {
    const label = run.value("label", code);
    const rank = run.overview.uses.filter((uses) => uses > run.value("uses", code)).length + 1;
    const lost = concept.effect?.lost ?? null;
    return element(
      "dl",
      { class: "tiles" },
      tile(
        "Uses",
        count(run.value("uses", code)),
        `rows of training texts; number ${rank} of ${run.size.toLocaleString("en")}`,
      ),
      tile("Top word", percent(run.value("top_share", code)), "of its rows are its most frequent word"),
      label === null
        ? null
        : tile("Main label", percent(run.value("purity", code)), ["of its rows: ", named(className(run, label), 30)]),
      lost === null
        ? null
        : tile("Effect", points(lost[0]), "percentage points of probability that the prediction loses without it"),
    );
  }

  function words(concept) {
    const most = Math.max(1, ...concept.words.map(([, uses]) => uses));
    const entries = concept.words.map(([word, uses]) => ({
      name: named(word, 200),
      part: uses / most,
      text: count(uses),
    }));
    const first = clvq.bars.list(entries.slice(0, 12), "words");
    if (entries.length <= 12) return first;
    return [
      first,
      element(
        "details",
        {},
        element("summary", {}, `${entries.length - 12} more words`),
        clvq.bars.list(entries.slice(12), "words"),
      ),
    ];
  }

  const badge = (run, kind, place) => {
    const dot = element("span", { class: `dot ${clvq.theme.shape(place)}`, "aria-hidden": "true" });
    dot.style.background = clvq.theme.label(place);
    return element("span", { class: "badge" }, dot, kind, named(className(run, place), 24));
  };

  /** Without the concept in this text: what becomes of the prediction. */
  function removal(run, code, sentence) {
    const answer = element("div", { class: "answer", role: "status" });
    const button = element("button", { type: "button", class: "small" }, "Remove it here");
    button.addEventListener("click", async () => {
      button.disabled = true;
      answer.replaceChildren(element("p", { class: "note" }, "Asking the model…"));
      try {
        const { before, after, rows } = await clvq.live.post("api/remove", {
          run: run.id,
          text: sentence.text,
          typed: null,
          codes: [code],
          removal: "centred",
          rows: "all",
        });
        answer.replaceChildren(
          element("p", { class: "note" }, `Removed in ${plural(rows.length, "row")} of this text:`),
          clvq.bars.change(before, after, run.site.classes),
        );
      } catch (error) {
        answer.replaceChildren(element("p", { class: "warning" }, error.message));
      } finally {
        button.disabled = false;
        button.focus();
      }
    });
    return { button, answer };
  }

  function sentence(run, code, one) {
    const live = run.site.live && one.text !== null ? removal(run, code, one) : null;
    return element(
      "li",
      {},
      element(
        "p",
        { class: "sentence", dir: "auto" },
        piece("span", "", short(one.before, CONTEXT, "end")),
        piece("mark", "", short(one.word, CONTEXT)),
        piece("span", "", short(one.after, CONTEXT)),
      ),
      element(
        "p",
        { class: "under" },
        one.text === null
          ? null
          : element("a", { href: `#/t/${one.text}?run=${run.id}&code=${code}` }, `Text ${one.text}`),
        one.label === null ? null : badge(run, "label", one.label),
        one.prediction === null ? null : badge(run, "predicted", one.prediction),
        live?.button,
      ),
      live?.answer,
    );
  }

  function sentences(run, code, concept) {
    const list = element("ul", { class: "sentences", "data-walk": "a" });
    const show = (kind) =>
      list.replaceChildren(
        ...concept.sentences.filter((one) => one.kind === kind).map((one) => sentence(run, code, one)),
      );
    const kinds = ["typical", "random"].filter((kind) => concept.sentences.some((one) => one.kind === kind));
    if (kinds.length === 0) return element("p", { class: "note" }, "No sentences were kept.");
    show(kinds[0]);
    const names = { typical: "Typical", random: "Random" };
    const choice = element(
      "fieldset",
      { class: "segments" },
      element("legend", {}, "Sentences"),
      kinds.map((kind, place) =>
        element(
          "label",
          {},
          element("input", {
            type: "radio",
            name: "kind",
            value: kind,
            checked: place === 0,
            onchange: () => show(kind),
          }),
          element("span", {}, names[kind]),
        ),
      ),
    );
    return [kinds.length > 1 ? choice : null, list];
  }

  /** Concepts with a cosine each. */
  function near(run, list) {
    return element(
      "ul",
      { class: "near", "data-walk": "a" },
      list.map(([code, cosine]) =>
        element("li", {}, clvq.runs.link(run, code), element("span", { class: "bar-value" }, number(cosine))),
      ),
    );
  }

  function decodes(run, concept) {
    const cosines = concept.upper_labels ?? [];
    const most = Math.max(0.05, ...cosines.map((value) => Math.abs(value ?? 0)));
    const norm = concept.upper_norm;
    return card(
      "decodes",
      "What it decodes to",
      ["Where the concept moves a row of the upper layer, ", named(run.info.upper), "."],
      norm === null || norm === undefined
        ? null
        : element("p", {}, `The move is ${percent(norm)} as long as a usual row of that layer.`),
      cosines.length
        ? [
            element("h3", {}, "Towards which label"),
            element(
              "p",
              { class: "note" },
              "Cosine with the labels' own directions: right of the middle is towards, left is away.",
            ),
            clvq.bars.diverging(
              cosines.map((value, place) => ({
                name: named(className(run, place), 40),
                value,
                colour: clvq.theme.label(place),
              })),
              most,
            ),
          ]
        : null,
      concept.upper_nearest?.length
        ? [element("h3", {}, "Concepts that decode to nearly the same"), near(run, concept.upper_nearest)]
        : null,
    );
  }

  function effect(run, concept) {
    const found = concept.effect;
    if (!found?.lost) return null;
    const [value, low, high] = found.lost;
    const reach = Math.max(Math.abs(low ?? value), Math.abs(high ?? value), Math.abs(value), 0.01) * 1.15;
    const byClass = found.by_class ?? [];
    const most = Math.max(0.01, ...byClass.map((one) => Math.abs(one ?? 0)));
    return card(
      "effect",
      "When it is removed",
      [
        `The concept was taken out of ${plural(found.texts, "text")} while the model ran (removal: `,
        named(found.removal, 30),
        "), and the probability of what the model predicts was compared.",
      ],
      element(
        "p",
        { class: "large-effect" },
        element("strong", {}, points(value)),
        low === null || high === null
          ? " percentage points lost; too few texts for an interval"
          : ` percentage points lost, 95% interval ${points(low)} to ${points(high)}`,
      ),
      element(
        "div",
        { class: "effect-line" },
        element("span", { class: "note" }, "gains"),
        clvq.bars.interval(found.lost, -reach, reach, 240),
        element("span", { class: "note" }, "loses"),
      ),
      found.flipped === null || found.flipped === undefined
        ? null
        : element("p", {}, `In ${percent(found.flipped)} of the texts the prediction itself changes.`),
      byClass.length
        ? [
            element("h3", {}, "Change of each class's probability"),
            clvq.bars.diverging(
              byClass.map((one, place) => ({
                name: named(className(run, place), 40),
                value: one ?? 0,
                text: points(one),
                colour: clvq.theme.label(place),
              })),
              most,
            ),
          ]
        : null,
    );
  }

  function steps(run, code) {
    const at = run.order.indexOf(run.place.get(code));
    const step = (place, name, key, sign) =>
      place === undefined
        ? null
        : element(
            "a",
            {
              class: "button",
              rel: key === "n" ? "next" : "prev",
              href: clvq.runs.address(run, run.overview.code[place]),
            },
            sign === "←" ? element("span", { "aria-hidden": "true" }, "← ") : null,
            name,
            sign === "→" ? element("span", { "aria-hidden": "true" }, " →") : null,
          );
    return element(
      "nav",
      { class: "steps", "aria-label": "Concepts in the table's order" },
      step(run.order[at - 1], "Previous", "p", "←"),
      step(run.order[at + 1], "Next", "n", "→"),
    );
  }

  function tools(run, code, concept) {
    const said = element("span", { class: "note", role: "status" });
    const button = (name, text, done) => {
      const made = element("button", { type: "button" }, name);
      made.addEventListener("click", async () => {
        said.textContent = (await clvq.describe.copy(text())) ? done : "The browser does not allow copying.";
      });
      return made;
    };
    const address = () => location.href;
    return element(
      "div",
      { class: "buttons" },
      button(
        "Copy as text",
        () => clvq.describe.plain(run, code, concept, address()),
        "The concept is in the clipboard.",
      ),
      button("Copy link", address, "The link is in the clipboard."),
      said,
    );
  }

  async function draw(site, [id, number_]) {
    const run = await clvq.runs.open(site, id);
    const code = Number(number_);
    const concept = await run.concept(code);
    if (concept === null) {
      const used = `${plural(run.size, "concept")} that ${run.size === 1 ? "is" : "are"} used in training`;
      throw new clvq.Unreadable(`There is no concept ${code} among the ${used} of “${run.info.name}”.`);
    }
    const shares = (id, heading, values) =>
      site.classes.length && values?.length ? card(id, heading, null, clvq.bars.shares(values, site.classes)) : null;
    return {
      title: `Concept ${code}: ${run
        .words(code)
        .map((word) => short(word, 20))
        .join(", ")} – ${site.title}`,
      part: "overview",
      ready: `concept:${id}:${code}`,
      content: [
        element(
          "div",
          { class: "crumbs" },
          element("a", { href: `#/${id}` }, "All concepts of ", named(run.info.name, 40)),
          steps(run, code),
        ),
        element(
          "h1",
          { class: "concept-title" },
          clvq.runs.swatch(code),
          element("span", { class: "code" }, `Concept ${code}`),
          element("span", { class: "title-words" }, clvq.runs.listed(run.words(code, 5), 30)),
        ),
        clvq.describe.summary(run, code, concept),
        tools(run, code, concept),
        tiles(run, code, concept),
        element(
          "div",
          { class: "columns" },
          element(
            "div",
            { class: "column wide" },
            card(
              "sentences-card",
              "In its sentences",
              "The marked word is where the concept stands. Typical: nearest to its centre; random: drawn from all " +
                "of its rows.",
              sentences(run, code, concept),
            ),
            effect(run, concept),
          ),
          element(
            "div",
            { class: "column" },
            card("words-card", "Words", "How often each stands in a row of this concept.", words(concept)),
            shares("labels", "Labels of its texts", concept.labels),
            shares("predictions", "What the model predicts for them", concept.predictions),
            concept.nearest?.length
              ? card(
                  "nearest",
                  "Nearest concepts",
                  ["Similar directions in the lower layer, ", named(run.info.lower), ": 1 is the same, 0 unrelated."],
                  near(run, concept.nearest),
                )
              : null,
            concept.upper_nearest?.length || concept.upper_labels?.length ? decodes(run, concept) : null,
          ),
        ),
      ],
    };
  }

  /** Whether the model predicts the label; nothing where one of them is unknown. */
  function verdict(label, prediction, word = "") {
    if (label === null || prediction === null) return null;
    const right = label === prediction;
    return element(
      "span",
      { class: right ? "right" : "wrong" },
      `${right ? "✓" : "✗"} ${word}${right ? "right" : "wrong"}`,
    );
  }

  return { draw, badge, verdict };
})();
