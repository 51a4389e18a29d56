// Strangers' text on the page: always as text, never as markup, and so that no sign of it moves its neighbours.
"use strict";

window.studyText = (() => {
  const LONG = 240;

  /** An element with attributes and children; text becomes text nodes. */
  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null) made.setAttribute(name, value);
    }
    made.append(...children.flat().filter((child) => child !== null));
    return made;
  }

  /** The text with control characters made visible, which browsers would leave out or draw anyhow. */
  function visible(text) {
    return text
      .replace(/[\u2028\u2029]/g, " ")
      .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, (sign) => String.fromCharCode(0x2400 + sign.charCodeAt(0)))
      .replace(/\u007f/g, "\u2421")
      .replace(/[\u0080-\u009f]/g, "\ufffd");
  }

  /** A piece of text, isolated from what stands beside it. */
  function piece(tag, name, text) {
    return element(tag, { class: `piece ${name}` }, visible(text));
  }

  /** Pieces in one line; where they are long, shortened, with a button that shows all. `keep`: which end stays. */
  function line(tag, name, parts) {
    const pieces = parts.map((part) => ({ ...part, signs: Array.from(part.text) }));
    const whole = pieces.map((part) => piece(part.tag, part.name, part.text));
    if (pieces.every((part) => part.signs.length <= LONG)) return element(tag, { class: name, dir: "auto" }, whole);
    const short = pieces.map((part) => {
      if (part.signs.length <= LONG) return piece(part.tag, part.name, part.text);
      const kept = part.keep === "end" ? part.signs.slice(-LONG) : part.signs.slice(0, LONG);
      return piece(part.tag, part.name, part.keep === "end" ? `…${kept.join("")}` : `${kept.join("")}…`);
    });
    const holder = element("span", { class: "pieces", dir: "auto" }, short);
    const button = element("button", { type: "button", class: "fold", "aria-expanded": "false" }, "Show all");
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "Show less" : "Show all";
      holder.replaceChildren(...(open ? whole : short));
    });
    return element(tag, { class: name }, holder, " ", button);
  }

  /** A name, such as that of a class: a word of whatever script. */
  function named(text) {
    const signs = Array.from(text);
    const shown = signs.length > LONG ? `${signs.slice(0, LONG).join("")}…` : text;
    return element("bdi", { class: "named" }, visible(shown) || "(no name)");
  }

  function percent(share) {
    const value = 100 * share;
    if (value >= 10) return `${Math.round(value)}%`;
    return value > 0 && value < 0.1 ? "<0.1%" : `${value.toFixed(1)}%`;
  }

  /** A bar as long as `part` of its place, with the share beside it. */
  function bar(share, part) {
    const fill = element("span", { class: "fill" });
    fill.style.width = `${Math.max(2, 100 * part)}%`;
    return [
      element("span", { class: "bar", "aria-hidden": "true" }, fill),
      element("span", { class: "share" }, percent(share)),
    ];
  }

  /** Words with bars, as a cloud or a list. */
  function words(list, form) {
    const most = Math.max(...list.map(([, share]) => share), 1e-9);
    const entries = list.map(([word, share]) => {
      const text = line("span", "word", [{ tag: "span", name: "", text: word || "(empty)", keep: "start" }]);
      if (form === "cloud") text.style.fontSize = `${(1 + 1.1 * Math.sqrt(share / most)).toFixed(2)}rem`;
      return element("li", {}, text, element("span", { class: "measure" }, bar(share, share / most)));
    });
    return element("ul", { class: form === "cloud" ? "cloud" : "list" }, entries);
  }

  function sentences(list) {
    const entries = list.map(([before, word, after]) =>
      line("li", "sentence", [
        { tag: "span", name: "", text: before, keep: "end" },
        { tag: "mark", name: "", text: word, keep: "start" },
        { tag: "span", name: "", text: after, keep: "start" },
      ]),
    );
    return element("ul", { class: "sentences" }, entries);
  }

  function labels(shares, classes) {
    const entries = shares.map((share, place) =>
      element("li", {}, named(classes[place]), element("span", { class: "measure" }, bar(share, share))),
    );
    return element("ul", { class: "list" }, entries);
  }

  return { element, named, words, sentences, labels };
})();
