// What only a browser can do: save a file, listen to a key, light and dark.
window.gptqPage = (() => {
  const THEME = "gptq-loader/theme";

  const shown = (part) => part && part.offsetParent;
  const press = (id) => {
    const button = document.querySelector(`#${id}`);
    const real = button && (button.matches("button") ? button : button.querySelector("button"));
    if (real) real.click();
    return !!real;
  };
  const page = {
    press,
    running: () => !!shown(document.querySelector("#stop")),
    // Wait for the reply that is being written to end, having stopped it.
    async idle() {
      if (!page.running()) return;
      press("stop");
      for (let i = 0; i < 200 && page.running(); i++) await new Promise((done) => setTimeout(done, 50));
    },
    // Call something with each element of a selector, now and whenever there is a new one.
    each(selector, call) {
      const known = new WeakSet();
      const look = () => document.querySelectorAll(selector).forEach((part) => {
        if (!known.has(part)) { known.add(part); call(part) }
      });
      new MutationObserver(look).observe(document, { childList: true, subtree: true });
      look();
    },
    download(text) {
      if (!text) return void page.say("There is nothing to export yet.");
      let file = null;
      try { file = JSON.parse(text) } catch { return }
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([file.text], { type: file.type }));
      link.download = file.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    },
    // Say something for a few seconds, with one thing to do about it.
    say(text, label, act) {
      document.querySelectorAll(".said").forEach((old) => old.remove());
      const box = document.createElement("div");
      box.className = "said";
      box.setAttribute("role", "status");
      box.append(text);
      if (label) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = label;
        button.addEventListener("click", () => { box.remove(); act() });
        box.append(button);
      }
      document.body.append(box);
      setTimeout(() => box.remove(), 10000);
    },
  };

  const paint = () => {
    let theme = null;
    try { theme = localStorage.getItem(THEME) } catch { return }
    if (theme) document.body.classList.toggle("dark", theme === "dark");
  };
  page.theme = () => {
    localStorage.setItem(THEME, document.body.classList.contains("dark") ? "light" : "dark");
    paint();
  };
  // Gradio chooses by the system's setting once it has begun: the person's choice comes after that.
  page.each("#about h1", paint);
  return page;
})();

// Grammars that others stand on: Prism's C++ fails where C has not been loaded, and draws nothing.
(() => {
  const MACRO = { pattern: /(^[\t ]*)#\s*[a-z]\w*.*/im, lookbehind: true, greedy: true, alias: "property" };
  const mend = (prism) => {
    const { extend } = prism.languages;
    prism.languages.extend = (name, more) => {
      if (name === "c" && !prism.languages.c) prism.languages.c = extend("clike", { macro: MACRO });
      return extend(prism.languages[name] ? name : "clike", more);
    };
    return prism;
  };
  let prism = window.Prism && mend(window.Prism);
  Object.defineProperty(window, "Prism", {
    configurable: true,
    get: () => prism,
    set(value) { prism = value && value.languages ? mend(value) : value },
  });
})();

// The branches of a repository: a row that is pressed names its branch.
(() => {
  let chosen = "";
  gptqPage.picked = () => chosen;
  // Mark the row of what is typed; return whether the table is of its repository.
  gptqPage.markBranch = (text) => {
    const table = document.querySelector("#branches table"), typed = text.replace(/\s/g, "");
    if (!table) return false;
    table.querySelectorAll("[data-branch]").forEach((button) =>
      button.setAttribute("aria-pressed", String(typed.endsWith(button.dataset.branch))));
    const { repo } = table.dataset, at = typed.indexOf(repo);
    return at >= 0 && /^([:/].*)?$/.test(typed.slice(at + repo.length));
  };
  document.addEventListener("click", ({ target }) => {
    const row = target.closest && target.closest("#branches tbody");
    const button = row && row.querySelector("[data-branch]");
    if (!button) return;
    chosen = button.dataset.branch;
    gptqPage.press("pick");
  });
  // What is in a list's box is replaced by what is typed.
  document.addEventListener("focusin", ({ target }) => {
    if (target.matches("#model input, #other input")) setTimeout(() => target.select());
  });
})();

// Keys, and the list of them.
(() => {
  const KEYS = [
    ["Enter", "Send the message"],
    ["Shift+Enter", "Begin a new line"],
    ["Escape", "Stop the reply, the load or the download"],
    ["Ctrl+Shift+O", "New chat"],
    ["Ctrl+K", "Search the chats"],
    ["Ctrl+B", "Show or hide the chats"],
    ["\u2191", "Edit the last question, from an empty message box"],
    ["Ctrl+Enter", "Send an edited message"],
    ["Ctrl+/", "This list"],
  ];
  const apple = /Mac|iP/.test(navigator.platform);
  const dialog = () => {
    const old = document.querySelector("dialog.keys");
    if (old) return old;
    const made = document.createElement("dialog");
    made.className = "keys";
    made.setAttribute("aria-label", "Keyboard shortcuts");
    const rows = KEYS.map(([keys, words]) => {
      const written = apple ? keys.replace("Ctrl", "\u2318") : keys;
      return `<tr><th scope="row">${written.split("+").map((key) => `<kbd>${key}</kbd>`).join("+")}</th><td>${words}</td></tr>`;
    });
    made.innerHTML = `<form method="dialog"><h2>Keyboard shortcuts</h2><table>${rows.join("")}</table><button>Close</button></form>`;
    made.addEventListener("click", ({ target }) => { if (target === made) made.close() });
    document.body.append(made);
    return made;
  };
  const DO = {
    chats: () => gptqPage.toggleChats(),
    theme: () => gptqPage.theme(),
    keys: () => (dialog().open ? dialog().close() : dialog().showModal()),
  };

  document.addEventListener("click", ({ target }) => {
    const button = target.closest && target.closest("[data-do]");
    if (button) DO[button.dataset.do]();
    const why = document.querySelector("#why[open]");
    if (why && !why.contains(target)) why.open = false;
  });
  document.addEventListener("keydown", (event) => {
    const { key, ctrlKey, metaKey, shiftKey, target } = event;
    const command = apple ? metaKey : ctrlKey;
    const done = (act) => { event.preventDefault(); act() };
    if (key === "Escape") {
      const why = document.querySelector("#why[open]");
      if (why) return void (why.open = false);
      if (document.querySelector("dialog[open]") || target.closest("#chats, .editor")) return;
      const running = [...document.querySelectorAll("button.stops")].find((button) => button.offsetParent);
      if (running) running.click();
    } else if (command && shiftKey && key.toLowerCase() === "o") done(() => gptqPage.newChat());
    else if (command && !shiftKey && key.toLowerCase() === "k") done(() => gptqPage.searchChats());
    else if (command && !shiftKey && key.toLowerCase() === "b") done(DO.chats);
    else if (command && key === "/") done(DO.keys);
    else if (key === "ArrowUp" && target.matches("#message textarea") && !target.value) done(() => gptqPage.editLast());
  });
})();

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
  gptqPage.each("#chat", (chat) => {
    new MutationObserver(grown).observe(chat, { childList: true, characterData: true, subtree: true });
    grown();
  });
})();
