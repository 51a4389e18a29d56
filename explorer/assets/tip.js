// What the pointer is over, beside it. All of it stands elsewhere on the page too, for those who use none.
"use strict";

clvq.tip = (() => {
  const { element, count, percent, points, named } = clvq.text;
  const box = document.getElementById("tip");

  function show(x, y, ...content) {
    box.replaceChildren(...content.flat(Infinity).filter((part) => part !== null));
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    box.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
    box.style.top = `${y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18}px`;
  }

  function hide() {
    box.hidden = true;
  }

  /** A concept in a few lines. */
  function concept(run, code) {
    const label = run.value("label", code);
    const effect = run.value("effect", code);
    return [
      element("p", { class: "tip-title" }, clvq.runs.swatch(code), `Concept ${code}`),
      element("p", { class: "tip-words" }, clvq.runs.listed(run.words(code, 5))),
      run.has(code)
        ? element(
            "p",
            {},
            `${count(run.value("uses", code))} rows`,
            label === null
              ? null
              : [` · ${percent(run.value("purity", code))} `, named(run.site.classes[label] ?? `class ${label}`)],
            effect === null ? null : ` · without it ${points(-effect)} points`,
          )
        : element("p", {}, "Not used in training."),
    ];
  }

  addEventListener("scroll", hide, { passive: true });
  addEventListener("hashchange", hide);
  return { show, hide, concept };
})();
