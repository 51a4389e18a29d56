// The keyboard: what each key does, and a panel that says so.
"use strict";

clvq.keys = (() => {
  const { element } = clvq.text;
  const KEY = "clvq-explorer keys";
  const panel = document.getElementById("help");
  const KEYS = [
    ["/", "to the search field"],
    ["j or ↓, k or ↑", "down and up in a table or list"],
    ["Enter", "open what has the focus"],
    ["n, p", "next and previous concept or text"],
    ["← →", "from word to word in a text"],
    ["Esc", "back"],
    ["?", "this panel"],
  ];
  let on = true;
  try {
    on = localStorage.getItem(KEY) !== "off";
  } catch {
    // Then they are on.
  }

  function keep(value) {
    on = value;
    try {
      localStorage.setItem(KEY, value ? "on" : "off");
    } catch {
      // It holds as long as the page is open.
    }
  }

  function help() {
    const box = element("input", { type: "checkbox", id: "use-keys", checked: on });
    box.addEventListener("change", () => keep(box.checked));
    const close = element("button", { type: "button", class: "main" }, "Close");
    close.addEventListener("click", () => panel.close());
    panel.replaceChildren(
      element("h2", { id: "help-heading" }, "Help"),
      element(
        "p",
        {},
        "The overview shows all concepts of a run; a concept's page says what it means, where it stands and what " +
          "happens without it; a text's page shows each word in its concept's colour.",
      ),
      element(
        "dl",
        { class: "terms keys" },
        KEYS.map(([key, text]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, text)]),
      ),
      element("label", { class: "check", for: "use-keys" }, box, " Use these keys"),
      element(
        "p",
        { class: "note" },
        "Everything can be reached with Tab as well. Each view's address can be kept and sent.",
      ),
      close,
    );
    panel.showModal();
  }

  const typing = (target) => target.closest?.("input:not([type=checkbox], [type=radio]), textarea, select") !== null;

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || panel.open) return;
    if (event.key === "Escape") {
      const shown = !document.getElementById("tip").hidden;
      clvq.tip.hide();
      if (typing(event.target)) event.target.blur();
      else if (!shown && on) clvq.route.back();
      return;
    }
    if (!on || typing(event.target)) return;
    const act = {
      "/": () => focusSearch(),
      "?": () => (help(), true),
      j: () => clvq.list.walk(1),
      k: () => clvq.list.walk(-1),
      ArrowDown: () => clvq.list.walking() && clvq.list.walk(1),
      ArrowUp: () => clvq.list.walking() && clvq.list.walk(-1),
      n: () => follow("next"),
      p: () => follow("prev"),
    }[event.key];
    if (act?.()) event.preventDefault();
  }

  function focusSearch() {
    const field = document.getElementById("search");
    if (field === null) return false;
    field.focus();
    field.select();
    return true;
  }

  function follow(rel) {
    const link = document.querySelector(`main a[rel=${rel}]`);
    link?.click();
    return link !== null;
  }

  function button() {
    return element(
      "button",
      { type: "button", class: "quiet", id: "help-button", "aria-label": "Help and keys", onclick: help },
      element("span", { "aria-hidden": "true" }, "?"),
    );
  }

  document.addEventListener("keydown", pressed);
  return { button };
})();
