// What belongs to a message: copy and edit over what was written, and the versions of a reply.
(() => {
  const page = window.gptqPage;
  const ICONS = {
    copy: "<path d='M9 9h11v11H9zM5 15H4V4h11v1'/>",
    done: "<path d='m5 13 4 4L19 7'/>",
    edit: "<path d='M4 20h4L19 9l-4-4L4 16zM13 7l4 4'/>",
    before: "<path d='m14 6-6 6 6 6'/>",
    after: "<path d='m10 6 6 6-6 6'/>",
  };
  const icon = (name) => `<svg viewBox="0 0 24 24" aria-hidden="true">${ICONS[name]}</svg>`;
  const button = (label, name, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.title = label;
    made.setAttribute("aria-label", label);
    made.innerHTML = icon(name);
    made.addEventListener("click", () => act(made));
    return made;
  };
  const rows = () => [...document.querySelectorAll("#chat .message-row")]
    .filter((row) => row.querySelector("[data-testid]"));
  const messages = () => (page.current() || {}).messages || [];

  const copy = async (text, made) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a page that is not served from this machine, or by https
      const box = document.createElement("textarea");
      box.value = text;
      document.body.append(box);
      box.select();
      document.execCommand("copy");
      box.remove();
    }
    made.innerHTML = icon("done");
    setTimeout(() => { made.innerHTML = icon("copy") }, 1500);
  };
  const edit = (row, at) => {
    if (page.running() || row.querySelector(".editor")) return;
    const message = messages()[at], asks = message.role === "user";
    const shown = row.querySelector(".message");
    const editor = document.createElement("form"), box = document.createElement("textarea");
    editor.className = "editor";
    box.value = message.content || "";
    box.setAttribute("aria-label", asks ? "Edit the question" : "Edit the reply");
    box.style.minHeight = `${Math.min(shown.offsetHeight, innerHeight / 2)}px`;
    const save = document.createElement("button"), cancel = document.createElement("button");
    save.textContent = asks ? "Send again" : "Save";
    cancel.type = "button";
    cancel.textContent = "Cancel";
    editor.append(box, cancel, save);
    const end = () => { editor.remove(); row.classList.remove("edited") };
    const fit = () => { box.style.height = "auto"; box.style.height = `${box.scrollHeight + 2}px` };
    editor.addEventListener("submit", (event) => {
      event.preventDefault();
      end();
      const before = page.current();
      page.ask({ do: "edit", at, text: box.value }, asks ? "generate" : "change");
      if (asks && before.messages.length > at + 1) {
        page.say("What came after this question is gone.", "Undo", async () => {
          await page.idle();
          page.ask({ do: "open", stored: { opened: before, panel: null } });
        });
      }
    });
    cancel.addEventListener("click", end);
    box.addEventListener("input", fit);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); end() }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) editor.requestSubmit();
    });
    row.classList.add("edited");
    row.append(editor);
    fit();
    box.focus();
  };
  page.editLast = () => {
    const at = messages().findLastIndex((message) => message.role === "user");
    if (at >= 0) edit(rows()[at], at);
  };

  const bar = (row, message, at) => {
    const made = document.createElement("div"), count = (message.versions || []).length;
    made.className = "bar";
    made.append(
      button("Copy message", "copy", (pressed) => copy(message.content || "", pressed)),
      button("Edit", "edit", () => edit(row, at)),
    );
    if (count > 1) {
      const shown = message.shown || 0, where = document.createElement("span");
      where.textContent = `${shown + 1}/${count}`;
      where.setAttribute("aria-label", `version ${shown + 1} of ${count}`);
      where.setAttribute("role", "img");
      const go = (label, name, to) => {
        const arrow = button(label, name, () => page.running() || page.ask({ do: "version", at, shown: to }));
        arrow.disabled = to < 0 || to >= count;
        return arrow;
      };
      made.append(go("Earlier version", "before", shown - 1), where, go("Later version", "after", shown + 1));
    }
    return made;
  };
  // Draw the bars of those messages that have changed; a mutation that changes none ends here.
  page.drawBars = () => rows().forEach((row, at) => {
    const message = messages()[at], running = page.running();
    const state = message && !(running && at === messages().length - 1) ? JSON.stringify([at, message]) : "";
    const [old] = row.getElementsByClassName("bar");
    if ((old ? old.state : "") === state) return;
    if (old) old.remove();
    if (!state) return;
    const made = bar(row, message, at);
    made.state = state;
    row.append(made);
  });

  // A thought stays folded or unfolded as the person left it, while the answer below it grows.
  const folded = new Map();
  document.addEventListener("click", ({ target }) => {
    const summary = target.closest && target.closest("#chat summary");
    if (!summary) return;
    const at = rows().indexOf(summary.closest(".message-row"));
    folded.set(at, !summary.parentElement.open);
  });
  const keepFolded = () => rows().forEach((row, at) => {
    const thought = row.querySelector(".message details");
    if (thought && folded.has(at) && thought.open !== folded.get(at)) thought.open = folded.get(at);
    const text = row.querySelector("[data-testid]");
    const label = text.dataset.testid === "user" ? "Your message" : "Reply";
    if (text.getAttribute("aria-label") !== label) text.setAttribute("aria-label", label);
  });
  page.each("#chat", (chat) => new MutationObserver(() => {
    if (!rows().length) folded.clear();
    keepFolded();
    page.drawBars();
  }).observe(chat, { childList: true, characterData: true, subtree: true }));
})();
