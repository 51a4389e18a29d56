// A text with each row in its concept's colour, what is salient underlined, what people marked boxed.
"use strict";

clvq.reader = (() => {
  const { element, visible } = clvq.text;

  /** Pieces of the text from sign `from` to `to`, cut wherever a row or a rationale begins or ends. */
  function cut(length, rows, rationale) {
    const owner = new Array(length).fill(null);
    const marked = new Array(length).fill(-1);
    rows.forEach(([start, end, special], row) => {
      if (special) return;
      for (let sign = Math.max(0, start); sign < Math.min(end, length); sign += 1) owner[sign] ??= row;
    });
    (rationale ?? []).forEach(([start, end], span) => {
      for (let sign = Math.max(0, start); sign < Math.min(end, length); sign += 1) marked[sign] = span;
    });
    const pieces = [];
    for (let sign = 0; sign < length; sign += 1) {
      const last = pieces.at(-1);
      if (last && last.row === owner[sign] && last.span === marked[sign]) last.end = sign + 1;
      else pieces.push({ start: sign, end: sign + 1, row: owner[sign], span: marked[sign] });
    }
    return pieces;
  }

  /**
   * The text. `content`: {text, rows, codes, saliency, rationale}; `run` gives the concepts their words.
   * `chosen(code)` is told which concept the pointer or the keyboard is at; `null` when it has left.
   */
  function draw(run, content, chosen) {
    const signs = Array.from(content.text);
    const strongest = Math.max(1e-12, ...(content.saliency ?? [0]).map((value) => Math.abs(value ?? 0)));
    const holder = element("div", {
      class: "reader",
      dir: "auto",
      role: "group",
      "aria-label": "The text; arrow keys go from word to word",
    });
    const byCode = new Map();
    const links = [];

    function dressed(row, text, special) {
      const code = content.codes[row];
      if (code === null) return element("span", { class: "unassigned" }, text);
      const made = element(
        run.has(code) ? "a" : "span",
        {
          class: `row ${special ? "special" : ""}`,
          href: run.has(code) ? clvq.runs.address(run, code) : null,
          tabindex: links.length ? "-1" : "0",
          "data-row": row,
          "data-code": code,
        },
        text,
      );
      clvq.theme.tint(made, code);
      const saliency = content.saliency?.[row] ?? null;
      if (saliency !== null) made.style.setProperty("--salient", `${(6 * Math.abs(saliency)) / strongest}px`);
      if (!byCode.has(code)) byCode.set(code, []);
      byCode.get(code).push(made);
      links.push(made);
      return made;
    }

    const begin = content.rows.findIndex(([, , special]) => !special);
    const kept = content.rows.flatMap(([, , special], row) => (special ? [row] : []));
    const first = kept.filter((row) => begin < 0 || row < begin);
    const rest = kept.filter((row) => begin >= 0 && row > begin);
    const specials = (rows) =>
      rows.map((row) => {
        const made = dressed(row, "◦", true);
        made.append(element("span", { class: "visually-hidden" }, " special token "));
        return made;
      });
    holder.append(...specials(first));
    let box = null;
    let span = -1;
    for (const { start, end, row, span: own } of cut(signs.length, content.rows, content.rationale)) {
      const text = visible(signs.slice(start, end).join(""));
      if (own !== span) {
        span = own;
        box = own < 0 ? null : element("span", { class: "rationale" });
        if (box) holder.append(box);
      }
      (box ?? holder).append(row === null ? document.createTextNode(text) : dressed(row, text, false));
    }
    holder.append(...specials(rest));

    function mark(code) {
      for (const made of holder.querySelectorAll(".same")) made.classList.remove("same");
      for (const made of byCode.get(code) ?? []) made.classList.add("same");
    }
    function at(target) {
      const made = target?.closest?.(".row") ?? null;
      const code = made === null ? null : Number(made.dataset.code);
      mark(code);
      chosen(code);
      return made;
    }
    holder.addEventListener("mouseover", (event) => {
      const made = at(event.target);
      if (made === null) return clvq.tip.hide();
      return clvq.tip.show(event.clientX, event.clientY, clvq.tip.concept(run, Number(made.dataset.code)));
    });
    holder.addEventListener("mouseleave", () => {
      at(null);
      clvq.tip.hide();
    });
    holder.addEventListener("focusin", (event) => {
      const made = at(event.target);
      if (made === null || !made.matches(":focus-visible")) return;
      const { left, bottom } = made.getBoundingClientRect();
      clvq.tip.show(left, bottom - 14, clvq.tip.concept(run, Number(made.dataset.code)));
    });
    holder.addEventListener("focusout", () => {
      at(null);
      clvq.tip.hide();
    });
    holder.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const now = links.indexOf(event.target);
      const next = event.key === "Home" ? links[0] : event.key === "End" ? links.at(-1) : links[now + step];
      if (now < 0 || next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      links[now].setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });

    /** Concepts of the text and how many rows each has, the most frequent first. */
    const counts = new Map();
    content.codes.filter((code) => code !== null).forEach((code) => counts.set(code, (counts.get(code) ?? 0) + 1));
    const codes = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);

    /** Shows what is switched off. */
    function off(removed) {
      for (const made of links) made.classList.toggle("off", removed.has(Number(made.dataset.code)));
    }
    return { holder, codes, mark, off };
  }

  return { draw };
})();
