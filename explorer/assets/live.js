// What only a server with the model can do: switch concepts off, read a new text.
"use strict";

clvq.live = (() => {
  async function post(path, body, signal) {
    let response;
    try {
      response = await fetch(path, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        cache: "no-store",
        signal,
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached. Is “clvq explore --serve” still running?");
    }
    const answer = await response.json().catch(() => null);
    if (!response.ok) throw new Error(answer?.error ?? `The server refuses this (${response.status}).`);
    if (answer === null) throw new Error("The server's answer cannot be read.");
    return answer;
  }

  /** Asks one thing at a time: a newer question takes the place of an older one, whose answer is never used. */
  function latest() {
    let stop = null;
    const cancel = () => stop?.abort();
    async function ask(path, body) {
      cancel();
      stop = new AbortController();
      try {
        return await post(path, body, stop.signal);
      } catch (error) {
        if (error.name === "AbortError") return null;
        throw error;
      }
    }
    return { ask, cancel };
  }

  const best = (shares) => shares.indexOf(Math.max(...shares));

  return { post, latest, best };
})();
