// What only a browser can do: store conversations, save a file, listen to a key.
window.gptqPage = (() => {
  const PREFIX = "gptq-loader/conversation/", CURRENT = "gptq-loader/current";

  const parsed = (text) => {
    try { return JSON.parse(text) } catch { return null }
  };
  const stored = () => Object.keys(localStorage)
    .filter((key) => key.startsWith(PREFIX))
    .map((key) => parsed(localStorage.getItem(key)))
    .filter((chat) => chat && chat.value)
    .sort((one, other) => other.time - one.time);
  const list = (more) => JSON.stringify({
    current: sessionStorage.getItem(CURRENT) || "",
    listed: stored().map(({ value }) => ({ key: value.key, title: value.title })),
    ...more,
  });

  return {
    // Store a conversation, or delete it once it is empty; return the list.
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
    // Return the list with one conversation to show: the named one, or that of this tab.
    open(key) {
      key = key || sessionStorage.getItem(CURRENT) || "";
      const chat = parsed(localStorage.getItem(PREFIX + key));
      if (chat) sessionStorage.setItem(CURRENT, key);
      return list({ opened: chat && chat.value });
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

// Escape stops what is running.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const running = [...document.querySelectorAll("button.stops")].find((button) => button.offsetParent);
  if (running) running.click();
});

// The chat follows a reply that grows, until the user scrolls up in it: one step is enough.
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
    const count = box.querySelectorAll("[data-testid=user]").length;
    if (count !== questions || box.scrollHeight <= box.clientHeight) following = true;
    questions = count;
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
