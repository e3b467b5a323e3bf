// What only a browser can do: keep conversations, save a file, listen to a key.
window.gptqPage = (() => {
  const PREFIX = "gptq-loader/conversation/", CURRENT = "gptq-loader/current";

  const parsed = (text) => {
    try { return JSON.parse(text) } catch { return null }
  };
  const kept = () => Object.keys(localStorage)
    .filter((it) => it.startsWith(PREFIX))
    .map((it) => parsed(localStorage.getItem(it)))
    .filter((it) => it && it.value)
    .sort((one, other) => other.time - one.time);
  const list = (more) => JSON.stringify({
    current: sessionStorage.getItem(CURRENT) || "",
    listed: kept().map((it) => ({ key: it.value.key, title: it.value.title })),
    ...more,
  });

  return {
    // Keep a conversation, or forget it once nothing is left of it; give the list.
    keep(text) {
      const value = parsed(text);
      let full = false;
      if (value && value.key) {
        sessionStorage.setItem(CURRENT, value.key);
        if (!value.messages.length) localStorage.removeItem(PREFIX + value.key);
        else try {
          localStorage.setItem(PREFIX + value.key, JSON.stringify({ time: Date.now(), value }));
        } catch { full = true }
      } else sessionStorage.removeItem(CURRENT);
      return list({ full });
    },
    // Give the list with one conversation to show: a named one, or that of this tab.
    open(key) {
      key = key || sessionStorage.getItem(CURRENT) || "";
      const found = parsed(localStorage.getItem(PREFIX + key));
      if (found) sessionStorage.setItem(CURRENT, key);
      return list({ opened: found && found.value });
    },
    forget(key) {
      localStorage.removeItem(PREFIX + key);
      sessionStorage.removeItem(CURRENT);
      return list();
    },
    download(text) {
      const file = parsed(text);
      if (!file) return;
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([file.text], { type: file.type }));
      link.download = file.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    },
  };
})();

// Escape stops what is being written.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const running = [...document.querySelectorAll("button.stops")].find((it) => it.offsetParent);
  if (running) running.click();
});

// The chat follows a reply that grows, until somebody scrolls up in it: one step is enough.
(() => {
  const CHAT = "#chat .bubble-wrap", NEAR = 24;
  let following = true, top = 0, questions = 0;
  const left = (box) => box.scrollHeight - box.clientHeight - box.scrollTop;
  const end = (box) => { box.scrollTop = box.scrollHeight; top = box.scrollTop };

  document.addEventListener("scroll", ({ target: box }) => {
    if (!box.matches || !box.matches(CHAT)) return;
    if (box.scrollTop < top) following = false;
    else if (left(box) < NEAR) following = true;
    top = box.scrollTop;
  }, true);
  const grown = () => {
    const box = document.querySelector(CHAT);
    if (!box) return;
    const asked = box.querySelectorAll("[data-testid=user]").length;
    if (asked !== questions || box.scrollHeight <= box.clientHeight) following = true;
    questions = asked;
    if (following && left(box) > 0) end(box);
  };
  const watch = () => {
    const chat = document.querySelector("#chat");
    if (!chat) return false;
    new MutationObserver(grown).observe(chat, { childList: true, characterData: true, subtree: true });
    grown();
    return true;
  };
  const waiting = new MutationObserver(() => { if (watch()) waiting.disconnect() });
  waiting.observe(document, { childList: true, subtree: true });
})();
