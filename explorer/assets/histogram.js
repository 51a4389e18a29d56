// How a figure is distributed over the concepts of two runs.
"use strict";

clvq.histogram = (() => {
  const { element, number, percent, named } = clvq.text;
  const BINS = 12;

  /** Edges of bins; on a logarithmic axis for counts. */
  function edges(values, logarithmic) {
    const [least, most] = values.reduce(
      ([a, b], value) => [Math.min(a, value), Math.max(b, value)],
      [Infinity, -Infinity],
    );
    const [from, to] = logarithmic ? [Math.log10(Math.max(1, least)), Math.log10(Math.max(1, most))] : [least, most];
    const width = (to - from || 1) / BINS;
    return Array.from({ length: BINS + 1 }, (_, bin) =>
      logarithmic ? 10 ** (from + bin * width) : from + bin * width,
    );
  }

  function counted(values, limits) {
    const counts = new Array(BINS).fill(0);
    for (const value of values) {
      let bin = BINS - 1;
      while (bin > 0 && value < limits[bin]) bin -= 1;
      counts[bin] += 1;
    }
    return counts.map((count) => (values.length ? count / values.length : 0));
  }

  function median(values) {
    const sorted = [...values].sort((a, b) => a - b);
    return sorted.length ? (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2 : null;
  }

  /** Bars of both runs; `null` where neither has values. */
  function draw(title, note, runs, column, { logarithmic = false, shares = false } = {}) {
    const lists = runs.map((run) => run.overview[column].filter((value) => value !== null));
    const both = lists.flat();
    if (both.length === 0) return null;
    const limits = edges(both, logarithmic);
    const say = shares ? percent : number;
    const counts = lists.map((values) => counted(values, limits));
    const medians = lists.map((values) => (values.length ? say(Number(median(values).toPrecision(3))) : "–"));
    const axis = () => ({
      axisLabel: clvq.chart.text(),
      axisLine: { lineStyle: { color: clvq.theme.paint("--line") } },
      splitLine: { show: false },
      axisTick: { show: false },
    });
    const place = clvq.chart.place(
      "histogram",
      `${title}: median ${runs.map((run, at) => `${medians[at]} in ${run.info.name}`).join(", ")}.`,
      () => ({
        animation: false,
        grid: { left: 44, right: 8, top: 10, bottom: 26 },
        xAxis: {
          type: "category",
          data: limits.slice(0, -1).map((limit) => say(Number(limit.toPrecision(2)))),
          ...axis(),
        },
        yAxis: {
          type: "value",
          ...axis(),
          axisLabel: { ...clvq.chart.text(), formatter: (value) => percent(value) },
          splitNumber: 3,
        },
        series: counts.map((data, at) => ({
          id: `run${at}`,
          type: "bar",
          data,
          barGap: "8%",
          barCategoryGap: "18%",
          itemStyle: { color: clvq.theme.label(at), borderRadius: [2, 2, 0, 0] },
          silent: true,
        })),
      }),
    );
    const key = (run, at) => {
      const dot = element("span", { class: "dot rect", "aria-hidden": "true" });
      dot.style.background = clvq.theme.label(at);
      return element("li", {}, dot, named(run.info.name, 30), `: median ${medians[at]}`);
    };
    return {
      start: place.start,
      holder: element(
        "figure",
        { class: "figure-holder" },
        element("figcaption", {}, element("strong", {}, title), element("span", { class: "note" }, ` ${note}`)),
        place.holder,
        element("ul", { class: "legend" }, runs.map(key)),
      ),
    };
  }

  return { draw };
})();
