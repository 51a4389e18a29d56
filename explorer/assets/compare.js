// Two runs side by side.
"use strict";

clvq.compare = (() => {
  const { element, named, number, count, percent, plural } = clvq.text;
  const ROWS = 30;

  function health(runs) {
    const labels = [...new Set(runs.flatMap((run) => run.info.health.map(([label]) => label)))];
    const found = (run, label) => run.info.health.find(([own]) => own === label);
    const cell = (run, label) => element("td", { class: "numeric" }, number(found(run, label)?.[1] ?? null));
    return element(
      "table",
      { class: "plain health" },
      element("caption", { class: "visually-hidden" }, "Health of both codebooks"),
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          element("th", { scope: "col" }, "Figure"),
          runs.map((run) => element("th", { scope: "col", class: "numeric" }, named(run.info.name, 30))),
        ),
      ),
      element(
        "tbody",
        {},
        labels.map((label) =>
          element(
            "tr",
            {},
            element(
              "th",
              { scope: "row" },
              label,
              element("span", { class: "note block" }, (found(runs[0], label) ?? found(runs[1], label))[2]),
            ),
            runs.map((run) => cell(run, label)),
          ),
        ),
      ),
    );
  }

  /** How the runs' concepts correspond, from where both gave their codes to the same rows. */
  function matches(runs, flows) {
    const [a, b] = runs;
    const flow = flows.find(
      ({ lower, upper, same_site: same }) =>
        same && ((lower === a.id && upper === b.id) || (lower === b.id && upper === a.id)),
    );
    if (flow === undefined) return null;
    const turned = flow.lower === b.id;
    const links = flow.links
      .map(([from, to, rows]) => (turned ? [to, from, rows] : [from, to, rows]))
      .sort((one, other) => other[2] - one[2]);
    const body = element("tbody", { "data-walk": "th a" });
    const rows = clvq.list.piecewise(
      body,
      ([from, to, shared]) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, clvq.runs.link(a, from)),
          element("td", {}, clvq.runs.link(b, to)),
          element("td", { class: "numeric" }, count(shared)),
        ),
      "pairs",
    );
    rows.set(links);
    return element(
      "section",
      { class: "card", "aria-labelledby": "match-heading" },
      element("h2", { id: "match-heading" }, "Which concepts correspond"),
      element(
        "p",
        { class: "note" },
        `Both runs gave a concept to the same ${plural(flow.rows, "row")}. The pairs that share most rows come first. `,
        `Agreement over all rows (normalised mutual information): ${number(flow.nmi)}, where 1 means the same ` +
          "groups and 0 unrelated ones.",
      ),
      element(
        "div",
        { class: "scroll", role: "region", tabindex: "0", "aria-label": "Pairs of concepts" },
        element(
          "table",
          { class: "plain pairs" },
          element("caption", { class: "visually-hidden" }, "Pairs of concepts that share rows"),
          element(
            "thead",
            {},
            element(
              "tr",
              {},
              runs.map((run) => element("th", { scope: "col" }, named(run.info.name, 30))),
              element("th", { scope: "col", class: "numeric" }, "Shared rows"),
            ),
          ),
          body,
        ),
        rows.button,
      ),
    );
  }

  /** The most used concepts of a run. */
  function largest(run) {
    const entries = [...run.overview.code.keys()]
      .sort((one, other) => run.overview.uses[other] - run.overview.uses[one])
      .slice(0, ROWS)
      .map((place) =>
        element(
          "li",
          {},
          clvq.runs.link(run, run.overview.code[place]),
          element("span", { class: "bar-value" }, count(run.overview.uses[place])),
          run.labelled ? element("span", { class: "bar-value" }, percent(run.overview.purity[place])) : null,
        ),
      );
    return element(
      "section",
      { class: "card" },
      element("h3", {}, named(run.info.name, 40)),
      element("p", { class: "note" }, run.labelled ? "With uses and purity." : "With uses."),
      element("ul", { class: "near tall", "data-walk": "a" }, entries),
    );
  }

  /** One text in the colours of both. */
  async function text(site, runs, number_) {
    const content = await clvq.texts.one(site, number_);
    return runs.map((run) => {
      const codes = content.codes[run.id];
      if (codes === undefined) return element("p", { class: "note" }, "No concepts of this run.");
      const read = clvq.reader.draw(run, { ...content, codes, saliency: null, rationale: null }, () => {});
      read.holder.classList.add("with-colours");
      return element(
        "section",
        { class: "card" },
        element("h3", {}, named(run.info.name, 40)),
        element("p", { class: "note" }, `${plural(read.codes.length, "concept")} in ${plural(codes.length, "row")}.`),
        read.holder,
      );
    });
  }

  function textPart(site, runs, query) {
    if (site.texts.count === 0) return null;
    const holder = element("div", { class: "halves even" });
    const problem = element("p", { class: "warning", role: "alert" });
    const field = element("input", {
      type: "number",
      id: "text-number",
      min: "0",
      max: String(site.texts.count - 1),
      value: query.get("text") ?? "0",
    });
    async function show() {
      const wanted = Number(field.value);
      problem.replaceChildren();
      if (!Number.isInteger(wanted) || wanted < 0 || wanted >= site.texts.count) {
        problem.replaceChildren(`The texts have the numbers 0 to ${site.texts.count - 1}.`);
        return;
      }
      try {
        const parts = await text(site, runs, wanted);
        if (Number(field.value) === wanted) holder.replaceChildren(...parts);
      } catch (error) {
        problem.replaceChildren(error.message);
      }
    }
    field.addEventListener("input", () => {
      clvq.route.replace({ text: field.value });
      show();
    });
    return {
      show,
      holder: element(
        "section",
        { "aria-labelledby": "text-heading" },
        element("h2", { id: "text-heading" }, "The same text in both"),
        element(
          "div",
          { class: "controls" },
          element(
            "label",
            { class: "field", for: "text-number" },
            element("span", {}, `Text (0 to ${site.texts.count - 1})`),
            field,
          ),
        ),
        problem,
        holder,
      ),
    };
  }

  async function draw(site, _, query) {
    if (site.runs.length < 2) throw new clvq.Unreadable("There is one run only: nothing to compare it with.");
    const ids = [query.get("a") ?? site.runs[0].id, query.get("b") ?? site.runs[1].id];
    const [runs, flows] = await Promise.all([
      Promise.all(ids.map((id) => clvq.runs.open(site, id))),
      site.flow ? clvq.load("flow") : [],
    ]);
    const choose = (name, title, id) =>
      clvq.textList.select(
        name,
        title,
        site.runs.map((run) => [run.id, `${run.name} (${run.method}, ${run.lower} to ${run.upper})`]),
        id,
        (value) => {
          clvq.route.replace({ [name]: value });
          clvq.route.draw();
        },
      );
    const charts = [
      clvq.histogram.draw("Uses", "rows of each concept, from rare to frequent", runs, "uses", { logarithmic: true }),
      runs.some((run) => run.labelled)
        ? clvq.histogram.draw("Purity", "share of a concept's main label", runs, "purity", { shares: true })
        : null,
      clvq.histogram.draw("Top word", "share of a concept's most frequent word", runs, "top_share", { shares: true }),
      runs.some((run) => run.measured)
        ? clvq.histogram.draw("Effect", "probability lost without a concept", runs, "effect")
        : null,
    ].filter((one) => one !== null);
    const read = textPart(site, runs, query);
    return {
      title: `${runs[0].info.name} and ${runs[1].info.name} – ${site.title}`,
      part: "compare",
      ready: "compare",
      content: [
        element("h1", {}, "Two runs side by side"),
        element(
          "p",
          { class: "lead" },
          "The same model and texts, sorted into concepts twice. What differs, and which concepts are the same?",
        ),
        element("div", { class: "controls" }, choose("a", "First", ids[0]), choose("b", "Second", ids[1])),
        element(
          "section",
          { class: "card", "aria-labelledby": "health-heading" },
          element("h2", { id: "health-heading" }, "Health"),
          health(runs),
        ),
        element(
          "section",
          { class: "card", "aria-labelledby": "spread-heading" },
          element("h2", { id: "spread-heading" }, "Distributions"),
          element("p", { class: "note" }, "The height of a bar is the share of a run's concepts."),
          element(
            "div",
            { class: "figures" },
            charts.map(({ holder }) => holder),
          ),
        ),
        matches(runs, flows),
        element("h2", {}, "The most used concepts"),
        element("div", { class: "halves even" }, runs.map(largest)),
        read?.holder,
      ],
      async placed() {
        for (const { start } of charts) start();
        await read?.show();
      },
    };
  }

  return { draw };
})();
