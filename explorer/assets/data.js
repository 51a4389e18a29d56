// The site's data: each file is a script that hands its content to `clvq.receive`, so that it loads from file:// too.
"use strict";

window.clvq = (() => {
  const waiting = new Map();
  const loaded = new Map();

  /** Called by the data files. */
  function receive(name, content) {
    const taker = waiting.get(name);
    waiting.delete(name);
    taker?.(content);
  }

  /** What stands between a person and the data, in words. */
  class Unreadable extends Error {}

  function fetched(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      waiting.set(name, resolve);
      const fail = (reason) => {
        script.remove();
        waiting.delete(name);
        loaded.delete(name);
        reject(new Unreadable(`The file data/${name}.js ${reason}. Build the site again with “clvq explore”.`));
      };
      script.addEventListener("error", () => fail("is missing or cannot be read"));
      script.addEventListener("load", () => {
        // It ran without handing anything over.
        if (waiting.has(name)) fail("is damaged");
        else script.remove();
      });
      script.src = `data/${name}.js`;
      document.head.append(script);
    });
  }

  /** A data file's content, kept once it is there. */
  function load(name) {
    if (!loaded.has(name)) loaded.set(name, fetched(name));
    return loaded.get(name);
  }

  /** The name of a numbered file: two digits or three, more where they are needed. */
  const shard = (folder, number, digits) => `${folder}/${String(number).padStart(digits, "0")}`;

  const texts = {
    list: () => load("texts/list"),
    async one(site, number) {
      const place = Math.floor(number / site.texts.per_shard);
      const found = (await load(shard("texts", place, 3))).find((text) => text.n === number);
      if (found === undefined) throw new Unreadable(`The site has no text ${number}.`);
      return found;
    },
  };

  return { receive, load, shard, texts, Unreadable };
})();
