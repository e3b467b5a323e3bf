// The chats of this browser: kept in its own storage, listed at the side, searched and renamed.
(() => {
  const PREFIX = "gptq-loader/conversation/", CURRENT = "gptq-loader/current";
  const PANEL = "gptq-loader/panel", SIDE = "gptq-loader/side";
  const LARGEST = 2 ** 20; // of a text file, in bytes: far more than any context
  const page = window.gptqPage;
  let command = null, current = null, search = "";

  const parsed = (text) => {
    try { return JSON.parse(text) } catch { return null }
  };
  const read = (key) => {
    const chat = parsed(localStorage.getItem(PREFIX + key));
    return chat && chat.value && Array.isArray(chat.value.messages) ? chat : null;
  };
  const write = (key, chat) => {
    try {
      localStorage.setItem(PREFIX + key, JSON.stringify(chat));
    } catch {
      page.say("The storage of this browser is full: this chat is not saved. Delete some older ones.");
    }
  };
  const stored = () => Object.keys(localStorage)
    .filter((key) => key.startsWith(PREFIX))
    .map((key) => read(key.slice(PREFIX.length)))
    .filter((chat) => chat)
    .sort((one, other) => other.time - one.time);
  const name = (chat) => chat.name || chat.value.title || "…";
  const openKey = () => sessionStorage.getItem(CURRENT) || "";

  // Ask the server for something: at once, or as a reply that is written.
  page.ask = (what, button = "change") => { command = what; page.press(button) };
  page.command = () => { const sent = JSON.stringify(command || {}); command = null; return sent };
  page.current = () => current;

  // Keep a conversation, or delete it once it is empty.
  page.keep = (text) => {
    const value = parsed(text);
    current = value && value.key ? value : null;
    if (current) {
      current.messages = current.messages || [];
      sessionStorage.setItem(CURRENT, value.key);
      const old = read(value.key);
      const same = old && JSON.stringify(old.value.messages) === JSON.stringify(current.messages);
      if (!current.messages.length) localStorage.removeItem(PREFIX + value.key);
      else if (!same) write(value.key, { ...old, time: Date.now(), value: current, panel: parsed(page.panel()) });
    } else sessionStorage.removeItem(CURRENT);
    draw();
    page.drawBars();
  };
  // Return what this tab shows when it opens: its conversation, and its settings.
  page.open = () => {
    const chat = read(openKey());
    current = chat ? chat.value : null;
    const panel = parsed(page.panel()) || (chat && chat.panel);
    setTimeout(() => { draw(); page.drawBars() });
    return JSON.stringify({ opened: current, panel });
  };
  // The settings beside the chat: those of this tab, and of the conversation that is open.
  page.panel = () => sessionStorage.getItem(PANEL) || "";
  page.keepPanel = (names, presets, custom, values) => {
    const panel = Object.fromEntries(names.map((option, i) => [option, values[i]]));
    sessionStorage.setItem(PANEL, JSON.stringify(panel));
    const chat = read(openKey());
    if (chat) write(openKey(), { ...chat, panel });
    const own = values[names.length];
    const same = Object.keys(presets).find((preset) =>
      Object.entries(presets[preset]).every(([option, value]) => Number(panel[option]) === value));
    return same || (own in presets ? custom : own);
  };

  const open = async (key) => {
    await page.idle();
    const chat = read(key);
    if (!chat) return;
    sessionStorage.setItem(CURRENT, key);
    current = chat.value;
    page.ask({ do: "open", stored: { opened: chat.value, panel: chat.panel || null } });
    if (narrow()) page.toggleChats(false);
    draw();
  };
  page.newChat = async () => {
    await page.idle();
    page.ask({ do: "new" });
    sessionStorage.removeItem(CURRENT);
    document.querySelector("#message textarea").focus();
  };
  const forget = async (key) => {
    const kept = localStorage.getItem(PREFIX + key), chat = read(key), was = key === openKey();
    if (was) await page.newChat();
    localStorage.removeItem(PREFIX + key);
    draw();
    page.say(`Deleted \u201c${name(chat)}\u201d.`, "Undo", () => {
      localStorage.setItem(PREFIX + key, kept);
      draw();
      if (was) open(key);
    });
  };
  const rename = (row, key) => {
    const box = document.createElement("input"), chat = read(key);
    box.value = name(chat);
    box.setAttribute("aria-label", "New name");
    row.replaceChildren(box);
    box.select();
    let ended = false;
    const end = (save) => {
      if (ended) return;
      ended = true;
      box.remove();
      if (save && box.value.trim()) write(key, { ...read(key), name: box.value.trim() });
      draw();
    };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") { event.stopPropagation(); end(false) }
    });
    box.addEventListener("blur", () => end(true));
  };

  // The list
  const DAY = 24 * 60 * 60 * 1000;
  const midnight = () => new Date().setHours(0, 0, 0, 0);
  const group = (time) => {
    if (time >= midnight()) return "Today";
    return time >= midnight() - DAY ? "Yesterday" : "Earlier";
  };
  const when = (time) => {
    const date = new Date(time);
    return time >= midnight() - DAY
      ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" })
      : date.toLocaleDateString([], { day: "numeric", month: "short" });
  };
  const matches = (chat, words) => {
    const text = [name(chat), ...chat.value.messages.map((message) => message.content || "")].join("\n").toLowerCase();
    return words.every((word) => text.includes(word));
  };
  const button = (className, label, text, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.className = className;
    made.title = label;
    made.setAttribute("aria-label", label);
    made.textContent = text;
    made.addEventListener("click", act);
    return made;
  };
  const rowOf = (chat) => {
    const row = document.createElement("li"), { key } = chat.value;
    const choose = button("choose", name(chat), "", () => open(key));
    const title = document.createElement("span"), time = document.createElement("time");
    title.textContent = name(chat);
    time.textContent = when(chat.time);
    time.dateTime = new Date(chat.time).toISOString();
    time.title = new Date(chat.time).toLocaleString();
    choose.removeAttribute("aria-label");
    choose.append(title, time);
    if (key === openKey()) choose.setAttribute("aria-current", "true");
    row.append(
      choose,
      button("small", `Rename ${name(chat)}`, "\u270e", () => rename(row, key)),
      button("small", `Delete ${name(chat)}`, "\u2715", () => forget(key)),
    );
    return row;
  };
  const draw = () => {
    const list = document.querySelector("#chats .list");
    if (!list || list.querySelector("input")) return;
    const words = search.toLowerCase().split(/\s+/).filter((word) => word);
    const chats = stored().filter((chat) => matches(chat, words));
    list.replaceChildren();
    let last = "";
    for (const chat of chats) {
      if (group(chat.time) !== last) {
        const heading = document.createElement("h3"), items = document.createElement("ul");
        heading.textContent = last = group(chat.time);
        list.append(heading, items);
      }
      list.lastChild.append(rowOf(chat));
    }
    if (!chats.length) {
      const none = document.createElement("p");
      none.textContent = words.length ? "No chat has these words." : "Your chats will be listed here. They stay in this browser.";
      list.append(none);
    }
  };
  page.each("#chats", (part) => {
    const box = document.createElement("input"), list = document.createElement("div");
    box.type = "search";
    box.placeholder = "Search";
    box.setAttribute("aria-label", "Search the chats");
    box.addEventListener("input", () => { search = box.value; draw() });
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { box.value = search = ""; draw(); document.querySelector("#message textarea").focus() }
    });
    list.className = "list";
    part.replaceChildren(box, list);
    draw();
  });
  window.addEventListener("storage", draw); // of another tab
  const side = () => document.querySelector("#side");
  const narrow = () => matchMedia("(max-width: 900px)").matches;
  page.toggleChats = (to) => {
    if (!side()) return;
    if (narrow()) return void side().toggleAttribute("data-over", to);
    side().toggleAttribute("data-hidden", to === undefined ? undefined : !to);
    localStorage.setItem(SIDE, side().hasAttribute("data-hidden") ? "hidden" : "");
  };
  page.searchChats = () => {
    document.querySelector("button[role=tab]").click();
    page.toggleChats(true);
    const box = document.querySelector("#chats input[type=search]");
    if (box) box.focus();
  };
  page.each("#side", (part) => {
    if (localStorage.getItem(SIDE) === "hidden") part.setAttribute("data-hidden", "");
  });
  document.addEventListener("click", ({ target }) => {
    if (!side() || !side().hasAttribute("data-over")) return;
    if (!target.closest("#side, [data-do]")) page.toggleChats(false);
  });

  // Files: attached to a message, or a conversation that is imported.
  const choose = (accept, act) => {
    const box = document.createElement("input");
    box.type = "file";
    box.multiple = true;
    if (accept) box.accept = accept;
    box.addEventListener("change", () => act([...box.files]));
    box.click();
  };
  const attach = async (files) => {
    const texts = [];
    for (const file of files) {
      const text = file.size > LARGEST ? null : await file.text();
      if (text === null) page.say(`${file.name} has more than 1 MB: attach a part of it.`);
      else if (text.includes("\0") || text.includes("\ufffd")) page.say(`${file.name} is no text file.`);
      else texts.push({ name: file.name, text });
    }
    if (texts.length) page.ask({ do: "attach", files: texts });
  };
  document.addEventListener("click", ({ target }) => {
    if (!target.closest) return;
    if (target.closest("#attach")) choose("", attach);
    if (target.closest("#import")) choose(".json,application/json", async ([file]) => {
      await page.idle();
      sessionStorage.removeItem(CURRENT);
      page.ask({ do: "import", text: await file.text() });
    });
    const away = target.closest("[data-detach]");
    if (away) page.ask({ do: "detach", at: Number(away.dataset.detach) });
  });
  for (const kind of ["drop", "paste"]) document.addEventListener(kind, (event) => {
    const files = (event.dataTransfer || event.clipboardData || {}).files;
    if (!files || !files.length || !event.target.closest("#talk")) return;
    event.preventDefault();
    event.stopPropagation();
    attach([...files]);
  }, true);
  document.addEventListener("dragover", (event) => {
    if (event.target.closest("#talk")) event.preventDefault();
  });
})();
