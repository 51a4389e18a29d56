// Small drawings within text: bars of shares, a value with its interval.
"use strict";

clvq.bars = (() => {
  const { element, drawing, named, percent, signed } = clvq.text;

  function bar(part, colour) {
    const fill = element("span", { class: "fill" });
    fill.style.width = `${Math.max(part > 0 ? 1 : 0, Math.min(100, 100 * part))}%`;
    if (colour) fill.style.background = colour;
    return element("span", { class: "bar", "aria-hidden": "true" }, fill);
  }

  /** A list of names with bars; entries: {name, part (of the full width), text, colour}. */
  function list(entries, kind = "") {
    return element(
      "ul",
      { class: `bars ${kind}` },
      entries.map(({ name, part, text, colour }) =>
        element(
          "li",
          {},
          element("span", { class: "bar-name" }, name),
          bar(part, colour),
          element("span", { class: "bar-value" }, text),
        ),
      ),
    );
  }

  /** The share of each class. */
  function shares(values, classes, kind = "") {
    return list(
      values.map((share, place) => ({
        name: named(classes[place] ?? `class ${place}`, 60),
        part: share ?? 0,
        text: percent(share),
        colour: clvq.theme.label(place),
      })),
      kind,
    );
  }

  /** Values from −most to most as bars from the middle. */
  function diverging(entries, most) {
    return element(
      "ul",
      { class: "bars" },
      entries.map(({ name, value, text, colour }) => {
        const fill = element("span", { class: "fill" });
        const width = Math.min(50, (50 * Math.abs(value ?? 0)) / (most || 1));
        fill.style.width = `${width}%`;
        fill.style.insetInlineStart = `${value < 0 ? 50 - width : 50}%`;
        if (colour) fill.style.background = colour;
        return element(
          "li",
          {},
          element("span", { class: "bar-name" }, name),
          element("span", { class: "bar middle", "aria-hidden": "true" }, fill),
          element("span", { class: "bar-value" }, text ?? signed(value)),
        );
      }),
    );
  }

  /** A dot with whiskers on a line that has zero; `from`, `to`: the ends of the line. */
  function interval([value, low, high], from, to, width = 96) {
    const within = (number) => Math.max(from, Math.min(to, number));
    const place = (number) => Math.round(((within(number) - from) / (to - from || 1)) * (width - 12) + 6);
    return drawing(
      "svg",
      { class: "interval", width, height: 14, viewBox: `0 0 ${width} 14`, "aria-hidden": "true" },
      drawing("line", { class: "base", x1: 0, x2: width, y1: 7, y2: 7 }),
      drawing("line", { class: "axis", x1: place(0), x2: place(0), y1: 0, y2: 14 }),
      low === null || high === null
        ? null
        : drawing("line", { class: "whisker", x1: place(low), x2: place(high), y1: 7, y2: 7 }),
      drawing("circle", { class: "dot", cx: place(value), cy: 7, r: 4 }),
    );
  }

  /** Probabilities before and after a change, for each class. */
  function change(before, after, classes) {
    return element(
      "ul",
      { class: "bars change" },
      before.map((was, place) => {
        const is = after[place];
        const colour = clvq.theme.label(place);
        const points = 100 * (is - was);
        const gone = bar(was, clvq.theme.grey());
        gone.classList.add("was");
        return element(
          "li",
          {},
          element("span", { class: "bar-name" }, named(classes[place] ?? `class ${place}`, 60)),
          element("span", { class: "bar-pair" }, gone, bar(is, colour)),
          element(
            "span",
            { class: "bar-value" },
            `${percent(was)} → ${percent(is)} `,
            element("span", { class: "delta" }, `(${signed(points, Math.abs(points) < 10 ? 1 : 0)})`),
          ),
        );
      }),
    );
  }

  return { list, shares, diverging, interval, change };
})();
