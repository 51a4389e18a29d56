// Light or dark, and the colours of labels, effects and codes; chosen to be told apart by the colour-blind.
"use strict";

clvq.theme = (() => {
  const { element } = clvq.text;
  const KEY = "clvq-explorer theme";
  const NAMES = ["auto", "light", "dark"];
  const root = document.documentElement;
  const listeners = new Set();
  // Okabe and Ito's palette, a lighter or darker shade where one would not stand out from the ground.
  const LABELS = {
    light: ["#0072b2", "#d55e00", "#00815d", "#b3568b", "#a87000", "#2b8fca", "#857a00", "#4a4f57"],
    dark: ["#56b4e9", "#f0813a", "#1fbf8f", "#e08fc0", "#e69f00", "#9ad0f2", "#f0e442", "#b7bcc5"],
  };
  const SHAPES = ["circle", "rect", "triangle", "diamond"];
  const GREY = { light: "#9aa0aa", dark: "#6d737d" };
  // From “more probable without it” to “less probable without it”.
  const EFFECT = { light: ["#5e3c99", "#c5c9d1", "#e66101"], dark: ["#b9a3ee", "#4d5159", "#fd9a4a"] };
  let chosen = "auto";
  try {
    const kept = localStorage.getItem(KEY);
    if (NAMES.includes(kept)) chosen = kept;
  } catch {
    // A browser that keeps nothing begins with its own preference.
  }
  const preference = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  const dark = () => !printing && (chosen === "auto" ? preference.matches : chosen === "dark");
  const now = () => (dark() ? "dark" : "light");

  function apply() {
    root.dataset.theme = now();
    for (const listener of listeners) listener();
  }
  preference.addEventListener("change", apply);
  // Paper is white, and what is drawn has no style sheet of its own.
  for (const [event, begins] of [
    ["beforeprint", true],
    ["afterprint", false],
  ]) {
    addEventListener(event, () => {
      printing = begins;
      apply();
    });
  }

  function choose(name) {
    chosen = name;
    try {
      localStorage.setItem(KEY, name);
    } catch {
      // It holds as long as the page is open.
    }
    apply();
  }

  /** The button that goes from one theme to the next. */
  function button() {
    const made = element("button", { type: "button", class: "quiet", id: "theme" });
    const name = () => {
      const word = chosen === "auto" ? "Auto" : chosen === "light" ? "Light" : "Dark";
      made.replaceChildren(
        element("span", { class: "sun", "aria-hidden": "true" }),
        element("span", { class: "hidden-narrow" }, word),
        element("span", { class: "visually-hidden" }, ` ${word} colours: change`),
      );
    };
    made.addEventListener("click", () => {
      choose(NAMES[(NAMES.indexOf(chosen) + 1) % NAMES.length]);
      name();
    });
    name();
    return made;
  }

  /** A style sheet's colour as it is now. */
  const paint = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  const channels = (hex) => [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));

  function between(one, other, share) {
    const [a, b] = [channels(one), channels(other)];
    return `#${a
      .map((value, place) =>
        Math.round(value + (b[place] - value) * share)
          .toString(16)
          .padStart(2, "0"),
      )
      .join("")}`;
  }

  const label = (number) => (number === null ? GREY[now()] : LABELS[now()][number % 8]);
  const shape = (number) => (number === null ? SHAPES[0] : SHAPES[Math.floor(number / 8) % SHAPES.length]);

  /** A label's colour, the greyer the less pure the concept is. */
  function purity(number, share, classes) {
    if (number === null || share === null) return GREY[now()];
    const chance = classes > 1 ? 1 / classes : 0;
    const pure = Math.max(0, Math.min(1, (share - chance) / (1 - chance)));
    return between(GREY[now()], label(number), 0.1 + 0.9 * pure);
  }

  function effect(value, most) {
    if (value === null) return GREY[now()];
    const [low, middle, high] = EFFECT[now()];
    const share = Math.min(1, Math.abs(value) / (most || 1));
    return between(middle, value < 0 ? low : high, share);
  }

  /** Marks an element with a code's own hue; neighbouring codes get hues far from each other. */
  function tint(target, code) {
    target.style.setProperty("--hue", String(Math.round((code * 137.508) % 360)));
    target.style.setProperty("--rich", String(0.6 + 0.2 * (code % 3)));
    return target;
  }

  apply();
  return { button, paint, label, shape, purity, effect, tint, now, grey: () => GREY[now()], listeners };
})();
