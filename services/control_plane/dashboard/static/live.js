// The connection: everything once, then what is new as server-sent events, and everything again after an interruption.
// A tab in the background has none: a browser opens six connections to one server, and every stream keeps one.

export function connect(store, { changed, loaded, said }) {
  let loading = null, waiting = [], source = null;

  async function load() {
    const answer = await fetch("v1/history");
    if (answer.status === 401) return location.reload();  // the login page
    if (!answer.ok) throw new Error(`history: HTTP ${answer.status}`);
    store.load(await answer.json());
  }

  // What arrives meanwhile is taken afterwards: it may be in what is being loaded, which does no harm.
  function reload() {
    loading ??= load().then(() => {
      for (const news of waiting.splice(0)) store.take(news);
      loading = null;
      said("live", "good");
      loaded();
    }).catch((error) => {
      loading = null;
      said(`${error.message}; trying again`, "bad");
      setTimeout(reload, 2000);
    });
  }

  function close() {
    source?.close();
    source = null;
  }

  function open() {
    close();
    if (document.hidden) return;
    source = new EventSource("v1/live");
    source.addEventListener("open", reload);
    source.addEventListener("error", async () => {
      const over = ["finished", "stopped"].includes(store.now?.state);
      said(over ? "the run has ended; `sapo dashboard RUN` serves it" : "no connection; trying again", "bad");
      if (source?.readyState !== EventSource.CLOSED) return;  // the browser tries again by itself
      setTimeout(open, 3000);
      const look = new AbortController();
      const answer = await fetch("v1/live", { signal: look.signal }).catch(() => null);
      if (answer?.status === 401) return location.reload();
      if (answer && !answer.ok) said((await answer.json()).error?.what ?? `HTTP ${answer.status}`, "bad");
      look.abort();
    });
    source.addEventListener("news", (event) => {
      const news = JSON.parse(event.data);
      if (loading) { if (waiting.length < 64) waiting.push(news); } else if (!store.take(news)) reload();
      changed();
    });
  }

  document.addEventListener("visibilitychange", open);
  open();
}
