// Puts the views together and begins.
"use strict";

(async () => {
  const { element, named, visible } = clvq.text;
  const top = document.getElementById("top");

  /** What cannot be shown, in words, where the view would be. */
  function failure(error) {
    const known = error instanceof clvq.Unreadable;
    return {
      title: "Not here",
      part: null,
      ready: "error",
      content: [
        element("h1", {}, "This cannot be shown"),
        element(
          "p",
          { class: "warning", role: "alert" },
          known
            ? visible(error.message)
            : `The data of this view are not as expected (${visible(error.message)}). Build the site again with ` +
                "“clvq explore”.",
        ),
        element("p", {}, element("a", { href: clvq.home() }, "To the overview")),
      ],
    };
  }

  let site = null;
  let run = "r0";
  clvq.home = () => `#/${run}`;
  clvq.current = () => run;

  function header() {
    const link = (part, href, text) => element("li", {}, element("a", { href, "data-part": part }, text));
    const home = element("a", { href: clvq.home(), "data-part": "overview" }, "Concepts");
    const switcher =
      site.runs.length < 2
        ? null
        : clvq.textList.select(
            "switch-run",
            "Run",
            site.runs.map((one) => [one.id, one.name]),
            run,
            (id) => {
              if (/^\/(t\/|new$)/.test(clvq.route.parse().path)) {
                clvq.route.replace({ run: id });
                clvq.route.draw();
              } else location.hash = `#/${id}`;
            },
          );
    top.append(
      element(
        "a",
        { class: "brand", href: clvq.home() },
        element("span", { class: "logo", "aria-hidden": "true" }, element("i"), element("i"), element("i")),
        element("span", { class: "brand-name" }, named(site.title, 60)),
      ),
      element(
        "nav",
        { "aria-label": "Views" },
        element(
          "ul",
          {},
          element("li", {}, home),
          site.texts.count > 0 ? link("texts", "#/texts", "Texts") : null,
          site.runs.length > 1 ? link("compare", "#/compare", "Compare") : null,
          layered ? link("flow", "#/flow", "Across layers") : null,
        ),
      ),
      element("div", { class: "top-tools" }, switcher, clvq.theme.button(), clvq.keys.button()),
    );
    return (id) => {
      run = id;
      home.href = clvq.home();
      top.querySelector(".brand").href = clvq.home();
      if (switcher) switcher.querySelector("select").value = id;
    };
  }

  let layered = false;
  try {
    site = await clvq.load("site");
    run = site.runs[0].id;
    layered = site.flow && new Set(site.runs.map((one) => one.lower)).size > 1;
  } catch (error) {
    await clvq.route.start([], () => failure(error));
    return;
  }
  const present = header();
  /** A view, given the site; it tells the header which run it is about. */
  const view = (pattern, draw, about = () => null) => ({
    pattern,
    draw(found, query) {
      const id = about(found, query);
      if (id !== null && site.runs.some((one) => one.id === id)) present(id);
      return draw(site, found, query);
    },
  });
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    document.querySelector("main h1")?.focus();
  });
  await clvq.route.start(
    [
      view(
        /^\/$/,
        (all, _, query) => {
          history.replaceState(history.state, "", clvq.home());
          return clvq.overview.draw(all, [run], query);
        },
        () => site.runs[0].id,
      ),
      view(/^\/texts$/, clvq.textList.draw),
      view(/^\/new$/, clvq.reading.fresh, (_, query) => query.get("run")),
      view(/^\/t\/(\d+)$/, clvq.reading.draw, (_, query) => query.get("run")),
      view(/^\/compare$/, clvq.compare.draw),
      view(/^\/flow$/, clvq.flow.draw),
      view(/^\/([^/]+)\/c\/(\d+)$/, clvq.concept.draw, ([id]) => id),
      view(/^\/([^/]+)$/, clvq.overview.draw, ([id]) => id),
    ],
    failure,
  );
})();
