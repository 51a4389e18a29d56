// Where answers go: to the server of a personal link, or, without one, into this browser until they are saved as a file.
"use strict";

window.studyStore = (() => {
  const FIRST_WAIT = 1000;
  const LONGEST_WAIT = 30000;
  const PATIENCE = 20000;

  // Where the browser keeps nothing, answers are kept as long as the page is open.
  const memory = new Map();

  function load(key) {
    try {
      return JSON.parse(localStorage.getItem(key) ?? memory.get(key) ?? "null");
    } catch {
      return JSON.parse(memory.get(key) ?? "null");
    }
  }

  /** Whether it will still be there when the page is opened again. */
  function save(key, value) {
    const text = JSON.stringify(value);
    memory.set(key, text);
    try {
      localStorage.setItem(key, text);
      return true;
    } catch {
      return false;
    }
  }

  function forget(key) {
    memory.delete(key);
    try {
      localStorage.removeItem(key);
    } catch {
      // Nothing was kept there.
    }
  }

  /** An answer of the server that sending again does not change. */
  class Refused extends Error {
    constructor(status) {
      super(
        status === 404
          ? "This link is not known. Please check that it is complete, or ask the people who sent it."
          : `The server refuses this page (${status}). Please reload it, or tell the people who sent the link.`,
      );
      this.status = status;
    }
  }

  /** Wakes when the time is over, or earlier when the network comes back. */
  function pause(milliseconds) {
    return new Promise((resolve) => {
      const wake = () => {
        clearTimeout(timer);
        removeEventListener("online", wake);
        resolve();
      };
      const timer = setTimeout(wake, milliseconds);
      addEventListener("online", wake);
    });
  }

  /** Keeps each answer until the server has it. */
  class Served {
    constructor(tell) {
      this.tell = tell;
      this.key = `clvq-waiting ${location.pathname}`;
      this.total = 0;
    }

    async request(path, body) {
      const stop = new AbortController();
      const timer = setTimeout(() => stop.abort(), PATIENCE);
      try {
        const response = await fetch(path, {
          method: body === undefined ? "GET" : "POST",
          headers: body === undefined ? {} : { "Content-Type": "application/json" },
          body: body === undefined ? undefined : JSON.stringify(body),
          cache: "no-store",
          signal: stop.signal,
        });
        if (response.ok) return await response.json();
        if (response.status >= 500 || response.status === 429 || response.status === 408) return null;
        throw new Refused(response.status);
      } catch (error) {
        if (error instanceof Refused) throw error;
        return null;
      } finally {
        clearTimeout(timer);
      }
    }

    /** Asks until the server answers. */
    async insist(path, body, waiting, done) {
      for (let wait = FIRST_WAIT; ; wait = Math.min(2 * wait, LONGEST_WAIT)) {
        const answer = await this.request(path, body);
        if (answer !== null) {
          this.tell(done, "");
          return answer;
        }
        this.tell(waiting, "warning");
        await pause(wait);
      }
    }

    async standing() {
      const kept = load(this.key);
      if (kept !== null) return (await this.answer(kept)).standing;
      return this.insist("state", undefined, "The server cannot be reached – trying again", "");
    }

    consent() {
      return this.insist("consent", {}, "The server cannot be reached – trying again", "");
    }

    async answer(given) {
      save(this.key, given);
      try {
        const answer = await this.insist("answers", given, "Not saved yet – trying again", "Saved");
        forget(this.key);
        return answer;
      } catch (error) {
        // It answers what was never asked here, or in a form that the server does not take: sent again, it never would be.
        if (error.status !== 409 && error.status !== 400) throw error;
        forget(this.key);
        this.tell("This answer could not be saved: please answer again", "warning");
        return { right: null, standing: await this.standing() };
      }
    }
  }

  function randomName() {
    return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  /** Questions of a booklet; answers stay in this browser. */
  class Local {
    constructor(data, booklet, tell) {
      this.data = data;
      this.tell = tell;
      this.booklet = booklet;
      this.questions = data.booklets[booklet - 1];
      this.key = `clvq-study ${data.study} ${booklet}`;
    }

    state() {
      return load(this.key) ?? { id: null, answers: [] };
    }

    keep(state) {
      const kept = save(this.key, state);
      this.tell(
        kept ? "Saved in this browser" : "Kept only while this page is open: save the answers before you close it",
        kept ? "" : "warning",
      );
    }

    async standing() {
      const { id, answers } = this.state();
      const place = answers.length;
      const total = this.questions.length;
      if (id === null) return { stage: "consent", answered: 0, total, question: null };
      if (place === total) return { stage: "done", answered: total, total, question: null };
      const [item, method] = this.questions[place];
      const practice = Object.hasOwn(this.data.right, item);
      const before = this.questions.filter(([other]) => Object.hasOwn(this.data.right, other)).length;
      const question = {
        place,
        item,
        method,
        practice,
        number: practice ? place + 1 : place - before + 1,
        of: practice ? before : total - before,
        ...this.data.views[`${item} ${method}`],
      };
      return { stage: "question", answered: place, total, question };
    }

    async consent() {
      if (this.state().id === null) this.keep({ id: randomName(), answers: [] });
      return this.standing();
    }

    async answer(given) {
      // Read again: another tab may have answered meanwhile.
      const state = this.state();
      if (state.id !== null && given.place === state.answers.length) {
        state.answers.push({ ...given, answered_at: new Date().toISOString() });
        this.keep(state);
      }
      return { right: this.data.right[given.item] ?? null, standing: await this.standing() };
    }

    /** The answers as a file for the people who run the study. */
    file() {
      const { id, answers } = this.state();
      const content = { format: "clvq-answers", version: 1, study: this.data.study, booklet: this.booklet, id, answers };
      return { name: `answers-${this.booklet}-${id.slice(0, 6)}.json`, text: `${JSON.stringify(content, null, 1)}\n` };
    }

    forget() {
      forget(this.key);
    }
  }

  return { Served, Local, load, save };
})();
