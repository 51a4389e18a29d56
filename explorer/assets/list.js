// Long lists and tables: drawn piece by piece as one comes to their end, gone through with the keyboard.
"use strict";

clvq.list = (() => {
  const { element } = clvq.text;
  const STEP = 60;

  /** Fills `body` with `draw(item)` of items, `STEP` at a time; the button brings more, by itself when it is seen. */
  function piecewise(body, draw, name) {
    const button = element("button", { type: "button", class: "more" });
    const observer = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && more(), {
      rootMargin: "300px",
    });
    let items = [];
    let drawn = 0;

    function more() {
      const next = items.slice(drawn, drawn + STEP);
      body.append(...next.map((item, place) => draw(item, drawn + place)));
      drawn += next.length;
      button.hidden = drawn >= items.length;
      button.textContent = `Show more of ${items.length.toLocaleString("en")} ${name}`;
      // Observed anew, so that it is told again where the button has stayed in sight.
      observer.unobserve(button);
      if (!button.hidden) observer.observe(button);
    }
    button.addEventListener("click", more);

    return {
      button,
      set(list) {
        items = list;
        drawn = 0;
        body.replaceChildren();
        more();
      },
    };
  }

  /** The links one goes through with the arrow keys, j and k: those of the list that has the focus, or of the first. */
  function walk(step) {
    const focused = document.activeElement;
    const list = focused?.closest("[data-walk]") ?? document.querySelector("main [data-walk]");
    if (list === null) return false;
    const links = [...list.querySelectorAll(list.dataset.walk)];
    if (links.length === 0) return false;
    const at = links.findIndex(
      (link) => link === focused || link.contains(focused) || link.closest("tr, li")?.contains(focused),
    );
    const next = links[at < 0 ? 0 : Math.max(0, Math.min(links.length - 1, at + step))];
    next.focus();
    next.scrollIntoView({ block: "nearest" });
    return true;
  }

  const walking = () => document.activeElement?.closest("[data-walk]") !== null;

  return { piecewise, walk, walking };
})();
