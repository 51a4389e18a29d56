// How concepts of a lower layer become those of a higher one.
"use strict";

clvq.flow = (() => {
  const { element, named, count, number, percent, visible, short, plural } = clvq.text;
  const SIZES = [20, 40, 80, 200];

  const layers = (site, { lower, upper }) => {
    const of = (id) => site.runs.find((run) => run.id === id);
    return `${of(lower).name} (${of(lower).lower}) to ${of(upper).name} (${of(upper).lower})`;
  };

  /** Pairs of runs of different layers, in the order of the layers. */
  function across(site, flows) {
    const natural = new Intl.Collator("en", { numeric: true });
    const layer = (id) => site.runs.find((run) => run.id === id).lower;
    return flows.filter((flow) => !flow.same_site).sort((a, b) => natural.compare(layer(a.lower), layer(b.lower)));
  }

  /** Pairs that can stand in one drawing: each run has at most one before it and one behind it. */
  function chained(flows) {
    const once = (name) => new Set(flows.map((flow) => flow[name])).size === flows.length;
    return flows.length > 1 && once("lower") && once("upper");
  }

  /** The largest links of each pair. */
  function chosen(flows, most) {
    const reached = new Map();
    return flows.flatMap((flow) => {
      const before = reached.get(flow.lower);
      // First what goes on from the concepts that the layer below leads to.
      const goesOn = ([from]) => (before === undefined || before.has(from) ? 0 : 1);
      const links = [...flow.links].sort((a, b) => goesOn(a) - goesOn(b) || b[2] - a[2]).slice(0, most);
      reached.set(flow.upper, new Set(links.map(([, to]) => to)));
      return links.map(([from, to, rows]) => ({ flow, from, to, rows }));
    });
  }

  function sankey(links, runs) {
    const key = (id, code) => `${id}:${code}`;
    const nodes = new Map();
    for (const { flow, from, to } of links) {
      nodes.set(key(flow.lower, from), { run: runs.get(flow.lower), code: from });
      nodes.set(key(flow.upper, to), { run: runs.get(flow.upper), code: to });
    }
    const depths = depthOf(links);
    const last = new Set(links.map(({ flow }) => flow.upper));
    for (const { flow } of links) last.delete(flow.lower);
    const options = () => {
      const ink = clvq.theme.paint("--text");
      return {
        animation: false,
        series: [
          {
            id: "flow",
            type: "sankey",
            left: 8,
            right: 8,
            top: 8,
            bottom: 8,
            nodeWidth: 12,
            nodeGap: 7,
            draggable: false,
            emphasis: { focus: "adjacency", lineStyle: { opacity: 0.75 } },
            data: [...nodes].map(([name, { run, code }]) => ({
              name,
              depth: depths.get(run.id),
              itemStyle: {
                color: clvq.theme.purity(run.value("label", code), run.value("purity", code), run.site.classes.length),
                borderWidth: 0,
              },
              label: {
                position: last.has(run.id) ? "left" : "right",
                formatter: () =>
                  `${code}  ${visible(
                    run
                      .words(code, 2)
                      .map((word) => short(word, 12))
                      .join(", "),
                  )}`,
                color: ink,
                fontSize: 11.5,
                fontFamily: "system-ui, sans-serif",
                textBorderColor: clvq.theme.paint("--ground"),
                textBorderWidth: 2,
              },
            })),
            links: links.map(({ flow, from, to, rows }) => ({
              source: key(flow.lower, from),
              target: key(flow.upper, to),
              value: rows,
              lineStyle: { color: "source", opacity: 0.3, curveness: 0.5 },
            })),
            labelLayout: { hideOverlap: true },
          },
        ],
      };
    };
    const place = clvq.chart.place(
      "sankey",
      "Flow of rows from the concepts of one layer to those of the next; the table has the same numbers.",
      options,
    );
    const columns = Math.max(...[...countPerRun(nodes).values()]);
    place.holder.style.height = `${Math.max(360, Math.min(1400, columns * 26))}px`;
    return {
      holder: place.holder,
      start() {
        const chart = place.start();
        chart.on("mousemove", ({ dataType, data, event }) => {
          const { clientX, clientY } = event.event;
          if (dataType === "node") {
            const { run, code } = nodes.get(data.name);
            clvq.tip.show(clientX, clientY, clvq.tip.concept(run, code));
          } else {
            const [from, to] = [nodes.get(data.source), nodes.get(data.target)];
            const name = ({ run, code }) => [`${code} `, clvq.runs.listed(run.words(code, 2))];
            clvq.tip.show(
              clientX,
              clientY,
              element("p", {}, name(from), " → ", name(to)),
              element("p", {}, plural(data.value, "row")),
            );
          }
        });
        chart.on("mouseout", clvq.tip.hide);
        chart.on("click", ({ dataType, data }) => {
          if (dataType !== "node") return;
          const { run, code } = nodes.get(data.name);
          if (run.has(code)) location.hash = clvq.runs.address(run, code);
        });
      },
    };
  }

  /** In which column of the drawing each run stands. */
  function depthOf(links) {
    const depths = new Map();
    for (const { flow } of links) {
      if (!depths.has(flow.lower)) depths.set(flow.lower, 0);
      depths.set(flow.upper, Math.max(depths.get(flow.upper) ?? 0, depths.get(flow.lower) + 1));
    }
    return depths;
  }

  function countPerRun(nodes) {
    const counts = new Map();
    for (const { run } of nodes.values()) counts.set(run.id, (counts.get(run.id) ?? 0) + 1);
    return counts;
  }

  function table(links, runs) {
    const body = element("tbody", { "data-walk": "th a" });
    const rows = clvq.list.piecewise(
      body,
      ({ flow, from, to, rows: shared }) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, clvq.runs.link(runs.get(flow.lower), from)),
          element("td", {}, clvq.runs.link(runs.get(flow.upper), to)),
          element("td", { class: "numeric" }, count(shared)),
          element("td", { class: "numeric" }, percent(shared / flow.rows)),
        ),
      "flows",
    );
    rows.set([...links].sort((a, b) => b.rows - a.rows));
    const head = (text, numeric) => element("th", { scope: "col", class: numeric ? "numeric" : null }, text);
    return element(
      "div",
      { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table of the flow" },
      element(
        "table",
        { class: "plain pairs" },
        element("caption", { class: "visually-hidden" }, "Rows that go from a lower to a higher concept"),
        element(
          "thead",
          {},
          element("tr", {}, head("Lower concept"), head("Higher concept"), head("Rows", true), head("Share", true)),
        ),
        body,
      ),
      rows.button,
    );
  }

  async function draw(site, _, query) {
    const flows = site.flow ? across(site, await clvq.load("flow")) : [];
    if (flows.length === 0)
      throw new clvq.Unreadable("There are no runs of different layers here: give “clvq explore” several.");
    const together = chained(flows);
    const wanted = query.get("pair") ?? (together ? "all" : "0");
    const shown = wanted === "all" && together ? flows : [flows[Number(wanted)] ?? flows[0]];
    const size = SIZES.includes(Number(query.get("links"))) ? Number(query.get("links")) : innerWidth < 640 ? 20 : 40;
    const ids = [...new Set(shown.flatMap((flow) => [flow.lower, flow.upper]))];
    const opened = await Promise.all(ids.map((id) => clvq.runs.open(site, id)));
    const runs = new Map(opened.map((run) => [run.id, run]));
    const links = chosen(shown, size);
    const drawn = sankey(links, runs);
    const again = (name) => (value) => {
      clvq.route.replace({ [name]: value });
      clvq.route.draw();
    };
    const pairs = flows.map((flow, place) => [String(place), layers(site, flow)]);
    return {
      title: `Across layers – ${site.title}`,
      part: "flow",
      ready: "flow",
      content: [
        element("h1", {}, "Across layers"),
        element(
          "p",
          { class: "lead" },
          "A word keeps its place while it goes up through the layers, but its concept may change. Each band is " +
            "the words that have one concept in the lower layer, on the left, and another in the higher one, on the " +
            "right; the wider, the more.",
        ),
        element(
          "div",
          { class: "controls" },
          flows.length > 1
            ? clvq.textList.select(
                "pair",
                "Layers",
                together ? [["all", "all of them"], ...pairs] : pairs,
                wanted,
                again("pair"),
              )
            : null,
          clvq.textList.select(
            "links",
            "Bands",
            SIZES.map((most) => [String(most), `the ${most} widest`]),
            String(size),
            again("links"),
          ),
        ),
        element(
          "section",
          { class: "card" },
          shown.map((flow) =>
            element(
              "p",
              { class: "note" },
              named(layers(site, flow), 120),
              `: ${plural(flow.rows, "row")}, of which ${percent(
                links.filter((link) => link.flow === flow).reduce((sum, link) => sum + link.rows, 0) / (flow.rows || 1),
              )} are drawn; agreement (normalised mutual information) ${number(flow.nmi)}.`,
            ),
          ),
          drawn.holder,
        ),
        element(
          "section",
          { class: "card", "aria-labelledby": "flow-heading" },
          element("h2", { id: "flow-heading" }, "The same as a table"),
          table(links, runs),
        ),
      ],
      placed: () => drawn.start(),
    };
  }

  return { draw };
})();
