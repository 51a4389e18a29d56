// Strangers' text on the page: always as text, never as markup, and so that no sign of it moves its neighbours.
"use strict";

clvq.text = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  function filled(made, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return made;
  }

  /** An element with attributes and children; text becomes text nodes. */
  const element = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);

  const drawing = (tag, attributes = {}, ...children) =>
    filled(document.createElementNS(SVG, tag), attributes, children);

  /** The text with control characters made visible, which browsers would leave out or draw anyhow. */
  function visible(text) {
    return String(text)
      .replace(/[\u2028\u2029]/g, " ")
      .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, (sign) => String.fromCharCode(0x2400 + sign.charCodeAt(0)))
      .replace(/\u007f/g, "\u2421")
      .replace(/[\u0080-\u009f]/g, "\ufffd");
  }

  /** The text cut to so many characters, at its end or (`keep` "end") at its beginning. */
  function short(text, most, keep = "start") {
    if (text.length <= most) return text;
    const signs = Array.from(text);
    if (signs.length <= most) return text;
    return keep === "end" ? `…${signs.slice(-most).join("")}` : `${signs.slice(0, most).join("")}…`;
  }

  /** A name or word of whatever script, isolated from what stands beside it. */
  function named(text, most = 48) {
    const shown = visible(short(String(text), most));
    return element("bdi", { class: "named" }, shown.trim() === "" ? (shown === "" ? "(empty)" : "␣") : shown);
  }

  /** A piece of running text. */
  const piece = (tag, name, text) => element(tag, { class: `piece ${name}` }, visible(text));

  const integers = new Intl.NumberFormat("en");
  const count = (value) => (value === null || value === undefined ? "–" : integers.format(value));

  function percent(share) {
    if (share === null || share === undefined) return "–";
    const value = 100 * share;
    if (value >= 99.95 || value === 0) return `${Math.round(value)}%`;
    if (value >= 10) return `${value.toFixed(0)}%`;
    return value < 0.1 ? "<0.1%" : `${value.toFixed(1)}%`;
  }

  /** Three significant digits, without an exponent where one can do. */
  function number(value) {
    if (value === null || value === undefined) return "–";
    if (typeof value === "string") return visible(value);
    if (Number.isInteger(value)) return count(value);
    const size = Math.abs(value);
    if (size >= 1000) return count(Math.round(value));
    if (size > 0 && size < 0.0005) return value.toExponential(1).replace("-", "−");
    return String(Number(value.toPrecision(3))).replace("-", "−");
  }

  /** With its sign, to `digits` places. */
  function signed(value, digits = 2) {
    if (value === null || value === undefined) return "–";
    const text = Math.abs(value).toFixed(digits);
    if (Number(text) === 0) return text;
    return `${value < 0 ? "−" : "+"}${text}`;
  }

  /** A probability lost, in percentage points. */
  const points = (lost) => {
    const size = Math.abs(100 * (lost ?? 0));
    return lost === null || lost === undefined ? "–" : signed(100 * lost, size >= 10 ? 1 : 2);
  };

  const plural = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

  return { element, drawing, visible, short, named, piece, count, percent, number, signed, points, plural };
})();
