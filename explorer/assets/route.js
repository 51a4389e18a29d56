// Addresses: each view has one, behind the #, so that it can be kept, sent and gone back to.
"use strict";

clvq.route = (() => {
  const root = document.documentElement;
  const main = document.getElementById("main");
  const status = document.getElementById("status");
  const scrolled = new Map();
  let serial = 0;
  let entry = null;
  let depth = 0;
  let views = [];
  let failed = null;
  let clean = [];

  function parse() {
    const [path, query = ""] = location.hash.replace(/^#/, "").split("?");
    return { path: path || "/", query: new URLSearchParams(query) };
  }

  /** The view's address with other settings: kept, but no step in the history. */
  function replace(settings) {
    const { path, query } = parse();
    for (const [name, value] of Object.entries(settings)) {
      if (value === null || value === "") query.delete(name);
      else query.set(name, value);
    }
    const text = query.toString();
    history.replaceState(history.state, "", `#${path}${text ? `?${text}` : ""}`);
  }

  /** Marks the history's entry, so that coming back to it finds the same place of the page. */
  function stamp() {
    const known = history.state?.clvq;
    if (known === undefined) {
      entry = `${Date.now()} ${Math.random()}`;
      depth += 1;
      history.replaceState({ clvq: entry, depth }, "");
      return 0;
    }
    entry = known;
    depth = history.state.depth;
    return scrolled.get(entry) ?? 0;
  }

  /** A view's clean-up, done when it is left. */
  function leaving(action) {
    clean.push(action);
  }

  async function draw() {
    const mine = ++serial;
    delete root.dataset.ready;
    const { path, query } = parse();
    const top = stamp();
    for (const action of clean.splice(0)) action();
    status.textContent = "";
    const slow = setTimeout(() => (status.textContent = "Loading…"), 300);
    let made;
    try {
      const view = views.find(({ pattern }) => pattern.test(path));
      if (view === undefined) throw new clvq.Unreadable("There is nothing at this address.");
      made = await view.draw(path.match(view.pattern).slice(1), query);
    } catch (error) {
      if (mine === serial && !(error instanceof clvq.Unreadable)) console.error(error);
      made = failed(error);
    }
    clearTimeout(slow);
    if (mine !== serial) return;
    status.textContent = "";
    main.replaceChildren(...made.content.flat().filter((part) => part !== null && part !== undefined));
    document.title = made.title;
    for (const link of document.querySelectorAll("#top nav a")) {
      if (link.dataset.part === made.part) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const heading = main.querySelector("h1");
    heading.setAttribute("tabindex", "-1");
    heading.focus({ preventScroll: true });
    let moved = false;
    try {
      moved = (await made.placed?.(top)) === true;
    } catch (error) {
      console.error(error);
    }
    if (mine !== serial) return;
    if (!moved) scrollTo(0, top);
    root.dataset.ready = made.ready;
  }

  /** Where Esc leads: the page before, or, where there is none, the one above. */
  function back() {
    if (depth > 1) history.back();
    else location.hash = clvq.home();
  }

  function start(list, onFailure) {
    views = list;
    failed = onFailure;
    history.scrollRestoration = "manual";
    addEventListener("scroll", () => root.dataset.ready && scrolled.set(entry, scrollY), { passive: true });
    addEventListener("hashchange", draw);
    return draw();
  }

  return { start, parse, replace, back, leaving, draw };
})();
