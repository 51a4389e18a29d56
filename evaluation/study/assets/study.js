// The pages of a study: consent, instructions, questions, thanks.
"use strict";

(() => {
  const data = window.studyData;
  const { element, named, words, sentences, labels } = window.studyText;
  const { Served, Local, load, save } = window.studyStore;
  const main = document.getElementById("main");
  const KEYS = ["g", "u", "f", "c"];
  const LONGEST = 86400000;

  function tell(text, kind) {
    const status = document.getElementById("status");
    // Only what is new is read out.
    if (status.textContent !== text) status.textContent = text;
    status.className = kind;
  }

  const paragraphs = (texts) => texts.map((text) => element("p", { dir: "auto" }, text));

  /** A page; its heading gets the focus, so that it is read out and the keyboard begins there. */
  function show(heading, ...content) {
    const title = element("h1", { tabindex: "-1" }, heading);
    main.replaceChildren(title, ...content.flat().filter((part) => part !== null));
    document.title = `${heading} – ${data.title}`;
    scrollTo(0, 0);
    title.focus({ preventScroll: true });
  }

  const contact = () => (data.contact.length ? element("section", { class: "contact" }, paragraphs(data.contact)) : null);

  function fail(error) {
    show("This does not go on", element("p", { class: "warning" }, error.message), contact());
  }

  /** Runs once at a time; what goes wrong is shown. */
  function once(button, action) {
    let busy = false;
    return async (event) => {
      event.preventDefault();
      if (busy) return;
      busy = true;
      button.setAttribute("aria-disabled", "true");
      try {
        await action();
      } catch (error) {
        fail(error);
      } finally {
        busy = false;
        button.removeAttribute("aria-disabled");
      }
    };
  }

  function complain(place, text, field) {
    place.replaceChildren(text);
    field.focus();
  }

  function consentPage(store) {
    const box = element("input", { type: "checkbox", id: "agree" });
    const problem = element("p", { class: "problem", role: "alert" });
    const button = element("button", { type: "submit", class: "main" }, "Take part");
    const form = element(
      "form",
      { novalidate: true },
      element("label", { class: "choice", for: "agree" }, box, element("span", {}, "I have read this, and I take part.")),
      problem,
      button,
    );
    const agreed = once(button, async () => next(store, await store.consent()));
    form.addEventListener("submit", (event) => {
      if (box.checked) return agreed(event);
      event.preventDefault();
      return complain(problem, "Please tick the box if you take part.", box);
    });
    show("Before you begin", paragraphs(data.consent), contact(), form);
  }

  function instructionsPage(store, standing) {
    const button = element("button", { type: "button", class: "main" }, "Begin");
    button.addEventListener("click", () => questionPage(store, standing.question));
    show("Instructions", paragraphs(data.instructions), keysHelp(), button);
  }

  function keysHelp() {
    const digits = data.classes.length === 2 ? "1 and 2" : `1 to ${Math.min(9, data.classes.length)}`;
    const names = data.confidences.map((name, place) => `${KEYS[place]} (${name})`).join(", ");
    return element(
      "p",
      { class: "note" },
      `Keys: ${digits} choose the class, ${names} say how sure you are, Enter saves. Tab and the arrow keys work as usual.`,
    );
  }

  const useKeys = () => load("clvq-study keys") !== false;

  function choices(name, legend, entries) {
    const options = entries.map(({ value, label, key }) => {
      const input = element("input", { type: "radio", name, value: String(value), id: `${name}-${value}` });
      const hint = key === null ? null : element("kbd", { "aria-hidden": "true" }, key);
      return element("label", { class: "choice", for: `${name}-${value}` }, input, element("span", {}, label), hint);
    });
    return element("fieldset", { class: name }, element("legend", {}, legend), options);
  }

  const part = (heading, content) => element("section", {}, element("h2", {}, heading), content);

  /** What is shown of the concept. */
  function view(question) {
    if (question.check !== null) {
      const asked = [" Please answer “", named(data.classes[question.check]), `” and “${data.confidences.at(-1)}”.`];
      return [element("p", { class: "check" }, "This is a check that you read.", asked)];
    }
    const found = [
      question.words.length ? part("Words of the group", words(question.words, data.words)) : null,
      question.sentences.length ? part("Sentences with these words", sentences(question.sentences)) : null,
      question.labels.length ? part("Classes of texts with these words", labels(question.labels, data.classes)) : null,
    ].filter((one) => one !== null);
    return found.length ? found : [element("p", { class: "check" }, "This group is empty: there is nothing to show.")];
  }

  function questionPage(store, question) {
    const began = performance.now();
    const answer = choices(
      "answer",
      "Which class did the model give to the text?",
      data.classes.map((name, value) => ({ value, label: named(name), key: value < 9 ? String(value + 1) : null })),
    );
    const sure = choices(
      "confidence",
      "How sure are you?",
      data.confidences.map((name, place) => ({ value: place + 1, label: name, key: KEYS[place] })),
    );
    const problem = element("p", { class: "problem", role: "alert" });
    const button = element("button", { type: "submit", class: "main" }, "Save and go on");
    const form = element("form", { novalidate: true, id: "question" }, answer, sure, problem, button);
    const chosen = (name) => form.querySelector(`input[name=${name}]:checked`);
    const send = once(button, async () => {
      const given = {
        place: question.place,
        item: question.item,
        method: question.method,
        answer: Number(chosen("answer").value),
        confidence: Number(chosen("confidence").value),
        milliseconds: Math.min(LONGEST, Math.max(0, Math.round(performance.now() - began))),
      };
      tell("Saving…", "");
      for (const field of [answer, sure]) field.disabled = true;
      const { right, standing } = await store.answer(given);
      if (right === null) next(store, standing);
      else feedbackPage(store, standing, question, given.answer, right);
    });
    form.addEventListener("submit", (event) => {
      if (chosen("answer") && chosen("confidence")) {
        problem.replaceChildren();
        return send(event);
      }
      event.preventDefault();
      return chosen("answer")
        ? complain(problem, "Please say how sure you are.", sure.querySelector("input"))
        : complain(problem, "Please choose a class.", answer.querySelector("input"));
    });
    const heading = `${question.practice ? "Practice" : "Question"} ${question.number} of ${question.of}`;
    const progress = element("progress", { max: String(question.of), value: String(question.number - 1), "aria-label": "Progress" });
    show(heading, progress, element("div", { class: "group" }, view(question)), form, help(), saveSoFar(store));
  }

  function help() {
    const box = element("input", { type: "checkbox", id: "keys" });
    box.checked = useKeys();
    box.addEventListener("change", () => save("clvq-study keys", box.checked));
    return element(
      "details",
      {},
      element("summary", {}, "Instructions and keys"),
      paragraphs(data.instructions),
      keysHelp(),
      element("label", { class: "choice", for: "keys" }, box, element("span", {}, "Digits and letters choose")),
    );
  }

  /** After practice: the right answer, with the group once more to learn from. */
  function feedbackPage(store, standing, question, answer, right) {
    const button = element("button", { type: "button", class: "main" }, "Go on");
    button.addEventListener("click", () => next(store, standing));
    const hit = answer === right;
    const quoted = (place) => ["“", named(data.classes[place]), "”"];
    const text = element(
      "p",
      { class: hit ? "right" : "wrong" },
      hit ? [] : ["You answered ", quoted(answer), ". "].flat(),
      ["The model gave the class ", quoted(right), "."].flat(),
    );
    show(hit ? "That is right" : "Not this one", text, element("div", { class: "group" }, view(question)), button);
  }

  function endPage(store) {
    const local = store instanceof Local;
    tell("", "");
    show(
      "Thank you",
      element("p", {}, local ? "You have answered all questions." : "You have answered all questions, and all answers are saved. You can close this page."),
      paragraphs(data.completion),
      local ? delivery(store) : null,
      contact(),
    );
  }

  function download({ name, text }) {
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    const link = element("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }

  function delivery(store) {
    const saver = element("button", { type: "button", class: "main" }, "Save the answers as a file");
    const remover = element("button", { type: "button", hidden: true }, "Remove the answers from this browser");
    saver.addEventListener("click", () => {
      download(store.file());
      remover.hidden = false;
    });
    remover.addEventListener("click", () => {
      store.forget();
      show("Removed", element("p", {}, "The answers are in the file that you saved, and no longer in this browser."));
    });
    return [
      element("p", {}, "One step is left: save the answers as a file, and send it to the people who run the study."),
      element("p", { class: "buttons" }, saver, remover),
    ];
  }

  function saveSoFar(store) {
    if (!(store instanceof Local)) return null;
    const button = element("button", { type: "button" }, "Stop here: save the answers so far as a file");
    button.addEventListener("click", () => download(store.file()));
    return element("p", {}, button);
  }

  function bookletPage() {
    const count = data.booklets.length;
    const field = element("input", { type: "number", id: "booklet", min: "1", max: String(count), inputmode: "numeric" });
    const problem = element("p", { class: "problem", role: "alert" });
    const form = element(
      "form",
      { novalidate: true },
      element("label", { for: "booklet" }, `The number of your booklet (1 to ${count})`),
      field,
      problem,
      element("button", { type: "submit", class: "main" }, "Go on"),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const number = Number(field.value);
      if (fits(number)) start(new Local(data, number, tell));
      else complain(problem, `Please give a number from 1 to ${count}.`, field);
    });
    show("Which booklet?", element("p", {}, "You were told a number together with the address of this page."), form, contact());
  }

  const fits = (number) => Number.isInteger(number) && number >= 1 && number <= data.booklets.length;

  function next(store, standing) {
    if (standing.stage === "consent") consentPage(store);
    else if (standing.stage === "done") endPage(store);
    else if (standing.answered === 0) instructionsPage(store, standing);
    else questionPage(store, standing.question);
  }

  async function start(store) {
    try {
      next(store, await store.standing());
    } catch (error) {
      fail(error);
    }
  }

  document.addEventListener("keydown", (event) => {
    const form = document.getElementById("question");
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (event.target.closest("button, summary, a, input:not([type=radio])")) return;
    if (event.key === "Enter" && !event.repeat) {
      const button = main.querySelector("button.main");
      event.preventDefault();
      if (form) form.requestSubmit();
      else if (button) button.click();
      return;
    }
    if (!form || !useKeys()) return;
    // By its place too: some keyboards have digits only with Shift.
    const digit = /^[1-9]$/.test(event.key) ? event.key : (/^(?:Digit|Numpad)([1-9])$/.exec(event.code) ?? [])[1];
    const sure = KEYS.indexOf(event.key.toLowerCase());
    const wanted = digit ? `answer-${digit - 1}` : `confidence-${sure + 1}`;
    const input = digit || sure >= 0 ? document.getElementById(wanted) : null;
    if (!input || input.matches(":disabled")) return;
    input.checked = true;
    input.focus({ preventScroll: true });
  });

  document.getElementById("title").textContent = data.title;
  document.title = data.title;
  const asked = Number(new URLSearchParams(location.search).get("booklet") ?? "0");
  if (!data.booklets) start(new Served(tell));
  else if (fits(asked)) start(new Local(data, asked, tell));
  else bookletPage();
})();
