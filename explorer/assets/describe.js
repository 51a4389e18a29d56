// A concept in words: the sentence at the top of its page, and all of it as plain text.
"use strict";

clvq.describe = (() => {
  const { element, named, count, percent, points, number, plural, visible } = clvq.text;

  const className = (run, place) => run.site.classes[place] ?? `class ${place}`;

  /** What one would tell of it: how often, which words, which label, what it does. */
  function summary(run, code, concept) {
    const label = run.value("label", code);
    const share = run.value("top_share", code);
    const parts = [
      `It stands in ${plural(run.value("uses", code), "row")} of the training texts`,
      run.words(code).length
        ? share === null || share < 0.5
          ? [", most often as ", strong(run.words(code, 3))]
          : [`, ${percent(share)} of them as `, strong(run.words(code, 1))]
        : "",
      ". ",
      label === null
        ? ""
        : [
            `${percent(run.value("purity", code))} of its rows are in texts labelled `,
            strong([className(run, label)]),
            ". ",
          ],
      effect(concept),
    ];
    return element("p", { class: "lead" }, parts);
  }

  const strong = (words) => words.flatMap((word, place) => [place ? ", " : "", element("strong", {}, named(word, 40))]);

  function effect(concept) {
    const found = concept.effect;
    if (!found?.lost) return "";
    const [value, low, high] = found.lost;
    const size = `${points(Math.abs(value)).replace("+", "")} percentage points`;
    const change = `Without it, the model's prediction ${value < 0 ? "gains" : "loses"} ${size} of probability`;
    if (low === null || high === null) return `${change} in the ${plural(found.texts, "text")} tried.`;
    const clear = low > 0 || high < 0;
    const rest = clear ? "." : ", which may be chance: the interval includes zero.";
    return `${change} on average${rest}`;
  }

  /** All of it as plain text, for notes and mails. */
  function plain(run, code, concept, address) {
    const { site, info } = run;
    const label = run.value("label", code);
    const shares = (values) => values.map((share, place) => `${className(run, place)} ${percent(share)}`).join(", ");
    const near = (list) =>
      list.map(([other, cosine]) => `  ${other} (${number(cosine)}): ${run.words(other, 3).join(", ")}`);
    const sentences = (kind) =>
      concept.sentences
        .filter((one) => one.kind === kind)
        .map((one) => `  ${one.before}[[${one.word}]]${one.after}${one.text === null ? "" : `  (text ${one.text})`}`);
    const lines = [
      `Concept ${code} of ${info.name} (${info.method}, ${info.lower} to ${info.upper}, ${site.made.model})`,
      address,
      "",
      `Uses: ${count(run.value("uses", code))}`,
      label === null ? null : `Main label: ${className(run, label)} (${percent(run.value("purity", code))})`,
      concept.labels?.length ? `Labels: ${shares(concept.labels)}` : null,
      concept.predictions?.length ? `Predictions: ${shares(concept.predictions)}` : null,
      concept.effect?.lost
        ? `Effect when removed (${concept.effect.removal}, ${concept.effect.texts} texts): ` +
          `${points(concept.effect.lost[0])} points lost ` +
          `[${points(concept.effect.lost[1])}, ${points(concept.effect.lost[2])}], ` +
          `${percent(concept.effect.flipped)} flipped`
        : null,
      "",
      `Words: ${concept.words.map(([word, uses]) => `${word} (${uses})`).join(", ")}`,
      "",
      "Typical sentences:",
      ...sentences("typical"),
      "",
      "Random sentences:",
      ...sentences("random"),
      "",
      "Nearest concepts (cosine):",
      ...near(concept.nearest ?? []),
    ];
    return `${lines
      .filter((line) => line !== null)
      .map(visible)
      .join("\n")}\n`;
  }

  /** Into the clipboard, by whichever way the browser has. */
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const field = element("textarea", { class: "visually-hidden", "aria-hidden": "true" });
      field.value = text;
      document.body.append(field);
      field.select();
      const done = document.execCommand("copy");
      field.remove();
      return done;
    }
  }

  return { summary, plain, copy, className };
})();
