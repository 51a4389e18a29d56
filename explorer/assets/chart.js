// A place that ECharts draws into: as large as its place, anew when the theme changes, gone when the view is left.
"use strict";

clvq.chart = (() => {
  const { element } = clvq.text;

  /** Draws `options()` once the place is in the page. What it shows stands in a table or list beside it. */
  function place(name, summary, options) {
    const holder = element("div", { class: `chart ${name}`, role: "img", "aria-label": summary });
    let chart = null;

    function draw() {
      chart?.setOption(options(), { notMerge: false, replaceMerge: ["series"] });
    }

    function start() {
      chart = echarts.init(holder, null, { renderer: "canvas" });
      draw();
      const observer = new ResizeObserver(() => {
        if (chart.getWidth() !== holder.clientWidth || chart.getHeight() !== holder.clientHeight) chart.resize();
      });
      observer.observe(holder);
      clvq.theme.listeners.add(draw);
      clvq.route.leaving(() => {
        observer.disconnect();
        clvq.theme.listeners.delete(draw);
        clvq.tip.hide();
        chart.dispose();
        chart = null;
      });
      return chart;
    }

    return { holder, start, draw };
  }

  const text = () => ({ color: clvq.theme.paint("--soft"), fontSize: 11, fontFamily: "system-ui, sans-serif" });

  return { place, text };
})();
