// The map of the codebook: a dot for each concept, near those whose directions are alike.
"use strict";

clvq.map = (() => {
  const { element, visible, short } = clvq.text;
  const NAMED = 40;

  /** The map of a run; `settings.colour`: "label", "effect" or "none". Also what shows and moves it. */
  function draw(run, settings) {
    const { x, y, uses, code, label, purity, effect } = run.overview;
    const bySize = uses.map((_, place) => place).sort((a, b) => uses[b] - uses[a]);
    // The strongest last, so that they lie on top.
    const byEffect = [...bySize].sort((a, b) => Math.abs(effect[a] ?? -1) - Math.abs(effect[b] ?? -1));
    const told = run.telling();
    const weight = (place) => told[place].weight * Math.sqrt(uses[place]);
    const byWord = [...bySize].sort((a, b) => weight(b) - weight(a));
    const most = run.reach();
    const classes = run.site.classes.length;
    const sight = { x: [0, 100], y: [0, 100] };
    let matches = null;
    let chart = null;

    const colour = (place) => {
      if (settings.colour === "label") return clvq.theme.purity(label[place], purity[place], classes);
      if (settings.colour === "effect") return clvq.theme.effect(effect[place], most);
      return clvq.theme.label(0);
    };
    const share = (value, [from, to]) => value >= -1.06 + (2.12 * from) / 100 && value <= -1.06 + (2.12 * to) / 100;
    const inside = (place) => share(x[place], sight.x) && share(y[place], sight.y);

    /** The places in sight that get a word written: those it tells most of, each word once. */
    function written() {
      const found = new Set();
      const words = new Set();
      for (const place of byWord) {
        if (found.size === NAMED) break;
        const { word } = told[place];
        if (word === null || words.has(word) || !inside(place) || (matches !== null && !matches[place])) continue;
        words.add(word);
        found.add(place);
      }
      return found;
    }

    function series() {
      const names = written();
      const ink = clvq.theme.paint("--text");
      const ground = clvq.theme.paint("--ground");
      const zoom = 100 / (sight.x[1] - sight.x[0]);
      const grown = Math.min(2, Math.sqrt(zoom)) * Math.max(0.6, Math.min(1, drawing.holder.clientWidth / 520));
      return [
        {
          id: "codes",
          type: "scatter",
          animation: false,
          clip: true,
          labelLayout: { hideOverlap: true },
          emphasis: { scale: 1.25, itemStyle: { borderColor: ink, borderWidth: 2 } },
          data: (settings.colour === "effect" ? byEffect : bySize).map((place) => {
            const shown = matches === null || matches[place];
            return {
              value: [x[place], y[place]],
              place,
              symbol: settings.colour === "label" ? clvq.theme.shape(label[place]) : "circle",
              symbolSize: (5 + 21 * Math.sqrt(uses[place] / run.most)) * grown,
              itemStyle: {
                color: colour(place),
                opacity: !shown ? 0.07 : settings.colour === "effect" && effect[place] === null ? 0.35 : 0.88,
                borderColor: ground,
                borderWidth: 0.8,
              },
              label: {
                show: names.has(place),
                position: x[place] > 0.7 ? "left" : "right",
                distance: 3,
                formatter: () => visible(short(told[place].word ?? "", 16)),
                color: ink,
                fontSize: 11.5,
                fontFamily: "system-ui, sans-serif",
                textBorderColor: ground,
                textBorderWidth: 2.5,
              },
              cursor: shown ? "pointer" : "default",
              emphasis: { disabled: !shown },
            };
          }),
        },
      ];
    }

    function options() {
      const axis = { type: "value", min: -1.06, max: 1.06, show: false };
      const inner = {
        type: "inside",
        filterMode: "none",
        zoomOnMouseWheel: "ctrl",
        moveOnMouseWheel: false,
        minSpan: 2,
      };
      // A finger on the whole map scrolls the page.
      inner.moveOnMouseMove = !matchMedia("(pointer: coarse)").matches || sight.x[1] - sight.x[0] < 99;
      return {
        animation: false,
        grid: { left: 4, right: 4, top: 4, bottom: 4 },
        xAxis: axis,
        yAxis: axis,
        dataZoom: [
          { ...inner, id: "x", xAxisIndex: 0, start: sight.x[0], end: sight.x[1] },
          { ...inner, id: "y", yAxisIndex: 0, start: sight.y[0], end: sight.y[1] },
        ],
        series: series(),
      };
    }

    const drawing = clvq.chart.place(
      "map",
      `Map of ${run.size} concepts: each is a dot, larger the more often it is used, near others of like direction. ` +
        "The table has the same concepts.",
      options,
    );

    function follow() {
      const [horizontal, vertical] = chart.getOption().dataZoom;
      sight.x = [horizontal.start, horizontal.end];
      sight.y = [vertical.start, vertical.end];
      chart.setOption({ series: series() });
    }

    /** Nearer by a factor, around the middle; the whole map without one. */
    function zoom(factor) {
      for (const name of ["x", "y"]) {
        const [from, to] = sight[name];
        const middle = (from + to) / 2;
        const half = factor === null ? 50 : Math.max(1, Math.min(50, (to - from) / 2 / factor));
        const centre = factor === null ? 50 : Math.max(half, Math.min(100 - half, middle));
        sight[name] = [centre - half, centre + half];
      }
      drawing.draw();
    }

    function start() {
      chart = drawing.start();
      let timer = null;
      chart.on("datazoom", () => {
        clearTimeout(timer);
        timer = setTimeout(() => chart && !chart.isDisposed() && follow(), 120);
      });
      const shown = ({ place }) => matches === null || matches[place];
      chart.on("mousemove", ({ data, event }) => {
        if (!shown(data)) return;
        const { clientX, clientY } = event.event;
        clvq.tip.show(clientX, clientY, clvq.tip.concept(run, code[data.place]));
      });
      chart.on("mouseout", clvq.tip.hide);
      chart.on("click", ({ data }) => {
        if (shown(data)) location.hash = clvq.runs.address(run, code[data.place]);
      });
    }

    function filter(found) {
      matches = found;
      if (chart) chart.setOption({ series: series() });
    }

    const button = (name, sign, factor) =>
      element(
        "button",
        { type: "button", class: "tool", "aria-label": name, title: name, onclick: () => zoom(factor) },
        sign,
      );
    const tools = element(
      "div",
      { class: "tools", role: "group", "aria-label": "Size of the map" },
      button("Nearer", "+", 1.6),
      button("Farther", "−", 1 / 1.6),
      button("Whole map", "⤢", null),
    );
    return {
      holder: element("div", { class: "map-holder" }, drawing.holder, tools),
      start,
      filter,
      redraw: drawing.draw,
    };
  }

  /** What the colours mean. */
  function legend(run, colour) {
    const entry = (paint, text, shape = "circle") => {
      const dot = element("span", { class: `dot ${shape}`, "aria-hidden": "true" });
      dot.style.background = paint;
      return element("li", {}, dot, text);
    };
    if (colour === "label") {
      return element(
        "ul",
        { class: "legend" },
        run.site.classes.map((name, place) =>
          entry(clvq.theme.label(place), clvq.text.named(name, 30), clvq.theme.shape(place)),
        ),
        entry(clvq.theme.grey(), "no label prevails"),
      );
    }
    if (colour === "effect") {
      const most = run.reach();
      return element(
        "ul",
        { class: "legend" },
        entry(
          clvq.theme.effect(most, most),
          `without it the prediction loses ${clvq.text.points(most).replace("+", "")} points or more`,
        ),
        entry(clvq.theme.effect(0, most), "nothing changes"),
        entry(clvq.theme.effect(-most, most), "it gains as much"),
        entry(clvq.theme.grey(), "not measured"),
      );
    }
    return element("p", { class: "note" }, "All concepts in one colour: this run has neither labels nor effects.");
  }

  return { draw, legend };
})();
