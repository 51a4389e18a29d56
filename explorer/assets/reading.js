// A text's page: the coloured text, its concepts, the prediction, and (with a server) switches for the concepts.
"use strict";

clvq.reading = (() => {
  const { element, named, plural } = clvq.text;
  const LEGEND = 14;

  /** Switches for what lies over the text. */
  function overlays(holder, content) {
    const offered = [
      ["colours", "Concepts", true],
      ["saliency", "Saliency: a thicker line, a weightier word", content.saliency !== null],
      ["rationale", "Rationale: what people marked as the reason", Boolean(content.rationale?.length)],
    ].filter(([, , there]) => there);
    return element(
      "fieldset",
      { class: "overlays" },
      element("legend", {}, "Show"),
      offered.map(([name, text]) => {
        holder.classList.add(`with-${name}`);
        const box = element("input", { type: "checkbox", id: `show-${name}`, checked: true });
        box.addEventListener("change", () => holder.classList.toggle(`with-${name}`, box.checked));
        return element("label", { for: `show-${name}` }, box, element("span", { class: `sample ${name}` }, text));
      }),
    );
  }

  /** The prediction now, or what becomes of it without some concepts. */
  function outcome(site, content) {
    const holder = element("div", { class: "outcome" });
    const said = element("p", { class: "verdict", role: "status" });
    const body = element("div", {});
    holder.append(said, body);
    const name = (place) => named(site.classes[place] ?? `class ${place}`, 40);

    function usual() {
      if (content.prediction === null) {
        said.replaceChildren();
        body.replaceChildren(element("p", { class: "note" }, "The cache holds no prediction for this text."));
        return;
      }
      said.replaceChildren("The model predicts ", element("strong", {}, name(content.prediction)), ".");
      body.replaceChildren(...(content.probabilities ? [clvq.bars.shares(content.probabilities, site.classes)] : []));
    }
    function changed({ before, after, rows }) {
      const [was, is] = [clvq.live.best(before), clvq.live.best(after)];
      said.replaceChildren(
        ...(was === is
          ? ["Still ", element("strong", {}, name(is))]
          : ["From ", element("strong", {}, name(was)), " to ", element("strong", {}, name(is))]),
        ` without ${plural(rows.length, "row")}.`,
      );
      said.classList.toggle("flipped", was !== is);
      body.replaceChildren(clvq.bars.change(before, after, site.classes));
    }
    function failed(error) {
      said.classList.remove("flipped");
      said.replaceChildren(element("span", { class: "warning" }, error.message));
    }
    usual();
    return {
      holder,
      usual: () => {
        said.classList.remove("flipped");
        usual();
      },
      changed,
      failed,
    };
  }

  /** The concepts of the text; with a server each can be switched off. */
  function legend(run, text, switched) {
    const removed = new Set();
    const entry = ([code, rows]) => {
      const line = element(
        "li",
        { "data-code": code },
        clvq.runs.link(run, code),
        element("span", { class: "bar-value" }, `×${rows}`),
      );
      if (switched) {
        const box = element("input", {
          type: "checkbox",
          checked: true,
          "aria-label": `Concept ${code} stays in the text`,
        });
        box.addEventListener("change", () => {
          if (box.checked) removed.delete(code);
          else removed.add(code);
          line.classList.toggle("off", !box.checked);
          text.off(removed);
          switched([...removed]);
        });
        line.prepend(box);
      }
      line.addEventListener("mouseenter", () => text.mark(code));
      line.addEventListener("mouseleave", () => text.mark(null));
      line.addEventListener("focusin", () => text.mark(code));
      line.addEventListener("focusout", () => text.mark(null));
      return line;
    };
    const entries = text.codes.map(entry);
    const list = (part) => element("ul", { class: "text-legend", "data-walk": "a" }, part);
    const reset = element("button", { type: "button", class: "small" }, "All on again");
    reset.addEventListener("click", () => {
      for (const box of holder.querySelectorAll("input:not(:checked)")) box.click();
    });
    const holder = element(
      "div",
      {},
      list(entries.slice(0, LEGEND)),
      entries.length > LEGEND
        ? element("details", {}, element("summary", {}, `${entries.length - LEGEND} more`), list(entries.slice(LEGEND)))
        : null,
      switched ? reset : null,
    );
    return {
      holder,
      highlight(code) {
        for (const line of entries) line.classList.toggle("same", Number(line.dataset.code) === code);
      },
    };
  }

  /** All of a text's parts. `asked`: how the server is told which text, {text} or {typed}. */
  function parts(site, run, content, asked) {
    const result = outcome(site, content);
    const server = clvq.live.latest();
    let removal = "centred";
    let removed = [];

    async function change(codes = removed) {
      removed = codes;
      if (codes.length === 0) {
        server.cancel();
        result.usual();
        return;
      }
      try {
        const answer = await server.ask("api/remove", { run: run.id, ...asked, codes, removal, rows: "all" });
        if (answer !== null && removed === codes) result.changed(answer);
      } catch (error) {
        if (removed === codes) result.failed(error);
      }
    }
    let list = null;
    const text = clvq.reader.draw(run, content, (code) => list?.highlight(code));
    list = legend(run, text, site.live ? change : null);
    const kind = site.live
      ? clvq.textList.select(
          "removal",
          "Way of removing",
          [
            ["centred", "centred: back to the layer's mean"],
            ["projection", "projection: the direction set to zero"],
          ],
          removal,
          (value) => {
            removal = value;
            change();
          },
        )
      : null;
    return element(
      "div",
      { class: "columns" },
      element(
        "section",
        { class: "column wide card", "aria-label": "Text" },
        overlays(text.holder, content),
        text.holder,
      ),
      element(
        "div",
        { class: "column" },
        element(
          "section",
          { class: "card", "aria-labelledby": "prediction-heading" },
          element("h2", { id: "prediction-heading" }, "Prediction"),
          result.holder,
        ),
        element(
          "section",
          { class: "card", "aria-labelledby": "legend-heading" },
          element("h2", { id: "legend-heading" }, "Concepts in this text"),
          element(
            "p",
            { class: "note" },
            site.live
              ? "Untick a concept: the model runs again without it, and the prediction above changes."
              : "With how many rows of the text have each.",
          ),
          list.holder,
          kind,
        ),
      ),
    );
  }

  async function draw(site, [number], query) {
    const place = Number(number);
    const id = query.get("run") ?? clvq.current();
    const [run, content] = await Promise.all([clvq.runs.open(site, id), clvq.texts.one(site, place)]);
    const label = content.label;
    const step = (to, name) =>
      to < 0 || to >= site.texts.count
        ? null
        : element("a", { class: "button", rel: to < place ? "prev" : "next", href: `#/t/${to}?run=${id}` }, name);
    const codes = content.codes[id];
    if (codes === undefined) throw new clvq.Unreadable(`Text ${place} has no concepts of “${run.info.name}”.`);
    return {
      title: `Text ${place} – ${site.title}`,
      part: "texts",
      ready: `text:${place}`,
      content: [
        element(
          "div",
          { class: "crumbs" },
          element("a", { href: "#/texts" }, "All texts"),
          element(
            "nav",
            { class: "steps", "aria-label": "Texts" },
            step(place - 1, "← Previous"),
            step(place + 1, "Next →"),
          ),
        ),
        element("h1", {}, `Text ${place}`),
        element(
          "p",
          { class: "under" },
          element("span", { class: "badge" }, "split ", named(content.split, 24)),
          label === null ? null : clvq.concept.badge(run, "label", label),
          clvq.concept.verdict(label, content.prediction, "predicted "),
        ),
        element(
          "p",
          { class: "lead" },
          "Words of one colour have one concept. Point at a word, or go there with the arrow keys, to see which; " +
            "open it to learn what it means.",
        ),
        site.live ? element("p", {}, element("a", { href: `#/new?run=${id}` }, "Type a new text")) : null,
        parts(site, run, { ...content, codes }, { text: place, typed: null }),
      ],
      placed(top) {
        // Come from a concept: its words are shown at once.
        const code = Number(query.get("code") ?? -1);
        const made = [...document.querySelectorAll(`.reader [data-code="${code}"]`)];
        for (const one of made) one.classList.add("same");
        if (made.length === 0 || top > 0) return false;
        made[0].scrollIntoView({ block: "center" });
        return true;
      },
    };
  }

  /** A text that someone types. */
  async function fresh(site, _, query) {
    if (!site.live) throw new clvq.Unreadable("A new text needs the model: start “clvq explore … --serve”.");
    const id = query.get("run") ?? clvq.current();
    const run = await clvq.runs.open(site, id);
    const field = element("textarea", { id: "typed", rows: "4", dir: "auto", maxlength: "12000" });
    const button = element("button", { type: "submit", class: "main" }, "Show its concepts");
    const problem = element("p", { class: "warning", role: "alert" });
    const result = element("div", {});
    const form = element(
      "form",
      { class: "card" },
      element("label", { class: "field", for: "typed" }, element("span", {}, "Your text"), field),
      button,
      problem,
    );
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (field.value.trim() === "" || button.disabled) return;
      button.disabled = true;
      problem.replaceChildren();
      try {
        const answer = await clvq.live.post("api/text", { text: field.value });
        const content = { ...answer, codes: answer.codes[id], rationale: null, saliency: answer.saliency ?? null };
        result.replaceChildren(
          answer.truncated
            ? element(
                "p",
                { class: "note" },
                `The model reads only its beginning: ${plural(answer.truncated, "token")} were cut off.`,
              )
            : "",
          parts(site, run, content, { text: null, typed: answer.text }),
        );
      } catch (error) {
        problem.replaceChildren(error.message);
      } finally {
        button.disabled = false;
      }
    });
    return {
      title: `A new text – ${site.title}`,
      part: "texts",
      ready: "new",
      content: [
        element("h1", {}, "A new text"),
        element("p", { class: "lead" }, "Type something; the model reads it and shows the concept of each word."),
        form,
        result,
      ],
    };
  }

  return { draw, fresh };
})();
