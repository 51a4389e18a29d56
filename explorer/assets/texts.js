// The list of texts: found by their beginnings, their split, label, and whether the model is right.
"use strict";

clvq.textList = (() => {
  const { element, named, plural } = clvq.text;

  function select(id, name, options, value, changed) {
    const box = element(
      "select",
      { id },
      options.map(([key, text]) => element("option", { value: key, selected: key === value }, clvq.text.visible(text))),
    );
    box.addEventListener("change", () => changed(box.value));
    return element("label", { class: "field", for: id }, element("span", {}, name), box);
  }

  async function draw(site, _, query) {
    if (site.texts.count === 0) throw new clvq.Unreadable("This site was built without texts.");
    const list = await clvq.texts.list();
    const lower = list.first.map((text) => text.toLowerCase());
    const labelled = list.label.some((label) => label !== null);
    const judged = labelled && site.texts.predictions;
    const wanted = Object.fromEntries(["q", "split", "label", "right"].map((name) => [name, query.get(name) ?? ""]));
    const found = element("p", { class: "note found", role: "status" });
    const body = element("ul", { class: "texts", "data-walk": "a" });

    function entry(number) {
      const label = list.label[number];
      const prediction = list.prediction?.[number] ?? null;
      return element(
        "li",
        {},
        element(
          "a",
          { href: `#/t/${number}?run=${clvq.current()}` },
          element("span", { class: "code" }, String(number)),
          element("span", { class: "first" }, named(list.first[number], 90)),
        ),
        element(
          "span",
          { class: "under" },
          label === null ? null : clvq.concept.badge({ site }, "label", label),
          prediction === null || prediction === label ? null : clvq.concept.badge({ site }, "predicted", prediction),
          clvq.concept.verdict(label, prediction),
        ),
      );
    }
    const entries = clvq.list.piecewise(body, entry, "texts");

    function arrange() {
      const sought = wanted.q.toLowerCase().trim();
      const shown = [];
      for (let number = 0; number < list.first.length; number += 1) {
        const prediction = list.prediction?.[number] ?? null;
        const known = list.label[number] !== null && prediction !== null;
        const right = list.label[number] === prediction;
        if (wanted.split !== "" && String(list.split[number]) !== wanted.split) continue;
        if (wanted.label !== "" && String(list.label[number]) !== wanted.label) continue;
        if (wanted.right !== "" && !(known && right === (wanted.right === "yes"))) continue;
        if (sought !== "" && !lower[number].includes(sought) && String(number) !== sought) continue;
        shown.push(number);
      }
      found.textContent =
        shown.length === list.first.length
          ? plural(shown.length, "text")
          : `${plural(shown.length, "text")} of ${list.first.length.toLocaleString("en")}`;
      entries.set(shown);
    }
    const change = (name) => (value) => {
      wanted[name] = value;
      clvq.route.replace({ [name]: value });
      arrange();
    };
    const field = element("input", {
      type: "search",
      id: "search",
      value: wanted.q,
      autocomplete: "off",
      placeholder: "how the text begins, or its number",
    });
    field.addEventListener("input", () => change("q")(field.value));
    arrange();
    return {
      title: `Texts – ${site.title}`,
      part: "texts",
      ready: "texts",
      content: [
        element("h1", {}, "Texts"),
        element(
          "p",
          { class: "lead" },
          "Open a text to see each of its words in the colour of its concept. ",
          site.live ? element("a", { href: "#/new" }, "Or type a new one.") : null,
        ),
        element(
          "div",
          { class: "controls" },
          element("label", { class: "field grow", for: "search" }, element("span", {}, "Search"), field),
          list.splits.length > 1
            ? select(
                "split",
                "Split",
                [["", "all"], ...list.splits.map((name, place) => [String(place), name])],
                wanted.split,
                change("split"),
              )
            : null,
          labelled
            ? select(
                "label",
                "Label",
                [["", "all"], ...site.classes.map((name, place) => [String(place), name])],
                wanted.label,
                change("label"),
              )
            : null,
          judged
            ? select(
                "right",
                "Prediction",
                [
                  ["", "all"],
                  ["yes", "right"],
                  ["no", "wrong"],
                ],
                wanted.right,
                change("right"),
              )
            : null,
          found,
        ),
        element("div", { class: "card" }, body, entries.button),
      ],
    };
  }

  return { draw, select };
})();
