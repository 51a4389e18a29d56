// The table of concepts: sorted by any column, as long as it is.
"use strict";

clvq.table = (() => {
  const { element, named, count, percent, points } = clvq.text;

  /** The columns that a run has something for. */
  function columns(run) {
    const {
      code,
      words,
      uses,
      top_share: share,
      label,
      purity,
      effect,
      effect_low: low,
      effect_high: high,
    } = run.overview;
    const reach = 1.3 * run.reach();
    return [
      {
        name: "code",
        title: "Concept",
        value: (place) => code[place],
        up: true,
        cell: (place) => [clvq.runs.swatch(code[place]), String(code[place])],
      },
      {
        name: "words",
        title: "Most frequent words",
        value: (place) => words[place][0]?.toLowerCase() ?? null,
        up: true,
        cell: (place) => clvq.runs.listed(words[place]),
      },
      {
        name: "uses",
        title: "Uses",
        numeric: true,
        value: (place) => uses[place],
        cell: (place) => count(uses[place]),
      },
      {
        name: "top",
        title: "Top word",
        numeric: true,
        value: (place) => share[place],
        cell: (place) => percent(share[place]),
      },
      run.labelled && {
        name: "purity",
        title: "Main label",
        value: (place) => purity[place],
        cell: (place) => {
          if (label[place] === null) return "–";
          const dot = element("span", { class: `dot ${clvq.theme.shape(label[place])}`, "aria-hidden": "true" });
          dot.style.background = clvq.theme.label(label[place]);
          return [
            element("span", { class: "figure" }, percent(purity[place])),
            dot,
            named(run.site.classes[label[place]] ?? `class ${label[place]}`, 20),
          ];
        },
      },
      run.measured && {
        name: "effect",
        title: "Effect",
        value: (place) => effect[place],
        cell: (place) =>
          effect[place] === null
            ? "–"
            : [
                element("span", { class: "figure" }, points(effect[place])),
                clvq.bars.interval([effect[place], low[place], high[place]], -reach, reach, 56),
                low[place] === null
                  ? null
                  : element(
                      "span",
                      { class: "visually-hidden" },
                      ` interval ${points(low[place])} to ${points(high[place])}`,
                    ),
              ],
      },
    ].filter(Boolean);
  }

  /** Places sorted by a column; those without a value last, ties by use. */
  function sorted(run, column, up) {
    const { uses } = run.overview;
    const order = run.overview.code.map((_, place) => place);
    const values = order.map((place) => column.value(place));
    const collator = new Intl.Collator("en");
    const compare = typeof values.find((value) => value !== null) === "string" ? collator.compare : (a, b) => a - b;
    return order.sort((a, b) => {
      if (values[a] === null || values[b] === null) return (values[a] === null) - (values[b] === null) || a - b;
      return (up ? 1 : -1) * compare(values[a], values[b]) || uses[b] - uses[a] || a - b;
    });
  }

  /** The table; `settings.sort`: a column's name, with a minus before it from large to small. */
  function draw(run, settings, changed) {
    const all = columns(run);
    const body = element("tbody", { "data-walk": "th a" });
    const walkable = (place, position) => {
      const address = clvq.runs.address(run, run.overview.code[place]);
      const cells = all.map((column, first) =>
        first === 0
          ? element("th", { scope: "row" }, element("a", { href: address }, column.cell(place)))
          : element("td", { class: `col-${column.name}${column.numeric ? " numeric" : ""}` }, column.cell(place)),
      );
      return element("tr", { "data-href": address, "aria-rowindex": position + 2 }, cells);
    };
    body.addEventListener("click", (event) => {
      if (event.target.closest("a") || getSelection()?.isCollapsed === false) return;
      const row = event.target.closest("tr");
      if (row) location.hash = row.dataset.href;
    });
    const rows = clvq.list.piecewise(body, walkable, "concepts");
    let matches = null;

    const heads = all.map((column) => {
      const button = element("button", { type: "button", class: "sort" }, column.title);
      const head = element("th", { scope: "col", class: column.numeric ? "numeric" : `col-${column.name}` }, button);
      button.addEventListener("click", () => {
        const now = settings.sort.replace("-", "");
        const first = column.up ? column.name : `-${column.name}`;
        const other = column.up ? `-${column.name}` : column.name;
        settings.sort = now === column.name && settings.sort === first ? other : first;
        arrange();
        changed();
      });
      return { head, column };
    });
    const table = element(
      "table",
      { class: "concepts" },
      element("caption", { class: "visually-hidden" }, "Concepts. The buttons of the headings sort."),
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          heads.map(({ head }) => head),
        ),
      ),
      body,
    );

    function arrange() {
      const up = !settings.sort.startsWith("-");
      const column = all.find((one) => one.name === settings.sort.replace("-", "")) ?? all[2];
      run.order = sorted(run, column, up);
      for (const { head, column: own } of heads) {
        if (own === column) head.setAttribute("aria-sort", up ? "ascending" : "descending");
        else head.removeAttribute("aria-sort");
      }
      show();
    }

    function show() {
      const shown = matches === null ? run.order : run.order.filter((place) => matches[place]);
      table.setAttribute("aria-rowcount", String(shown.length + 1));
      rows.set(shown);
      return shown.length;
    }

    arrange();
    return {
      holder: element(
        "div",
        { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table of concepts" },
        table,
        rows.button,
      ),
      filter(found) {
        matches = found;
        return show();
      },
    };
  }

  return { draw, columns };
})();
