"use strict";
const reports = JSON.parse(document.getElementById("reports").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, text, name) => {
  const it = document.createElement(tag);
  if (text !== undefined) it.textContent = text;
  if (name) it.className = name;
  return it;
};
const hue = (i) => (194 + 42.3 * i) % 360;
const opened = new Set();

// Prompts of all reports, joined by their text.
function join() {
  const rows = new Map();
  reports.forEach((report, r) => report.prompts.forEach((entry, p) => {
    if (!rows.has(entry.prompt)) rows.set(entry.prompt, { prompt: entry.prompt, from: [] });
    rows.get(entry.prompt).from[r] = { results: entry.results, stats: (report.stats || [])[p] };
  }));
  return [...rows.values()];
}
let rows = join();

function settings() {
  const names = new Set();
  for (const report of reports)
    for (const entry of report.prompts) for (const it of entry.results) names.add(it.sampling_config);
  return [...names];
}

const clean = (text) => text.endsWith("<|endoftext|>") ? text.slice(0, -13) : text;

// The replies to a row that the controls let through: report, setting, output, text, stat.
function replies(row) {
  const setting = $("setting").value, output = $("output").value;
  const list = [];
  row.from.forEach((own, r) => own && own.results.forEach((result, s) => {
    if (setting && result.sampling_config !== setting) return;
    result.outputs.forEach((text, o) => {
      if (output !== "" && o !== Math.min(+output, result.outputs.length - 1)) return;
      list.push({ r, setting: result.sampling_config, o, text: clean(text),
        params: result.sampling_params, stat: own.stats?.[s]?.[o] });
    });
  }));
  return list;
}

// Models' names without what all begin with: the branches of one repository, the folders of one folder.
function shortNames() {
  const names = reports.map((it) => it.model_name);
  if (names.length < 2) return names;
  let same = 0;
  while (same < names[0].length && names.every((it) => it[same] === names[0][same])) same++;
  const cut = names[0].slice(0, same).search(/[^:/]*$/);
  return names.map((it) => it.slice(cut) || it);
}

const words = (text) => text.match(/\s+|[^\s]+/g) || [];

// Which words of b are in the longest common subsequence with a; long texts by their own ends first.
function common(a, b) {
  const n = Math.min(a.length, 1500), m = Math.min(b.length, 1500);
  const table = new Uint16Array((n + 1) * (m + 1));
  for (let i = n - 1; i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      table[i * (m + 1) + j] = a[i] === b[j] ? table[(i + 1) * (m + 1) + j + 1] + 1
        : Math.max(table[(i + 1) * (m + 1) + j], table[i * (m + 1) + j + 1]);
  const kept = new Array(b.length).fill(false);
  for (let i = 0, j = 0; i < n && j < m;) {
    if (a[i] === b[j]) { kept[j] = true; i++; j++; }
    else if (table[(i + 1) * (m + 1) + j] >= table[i * (m + 1) + j + 1]) i++;
    else j++;
  }
  return kept;
}

function write(target, text, base) {
  if (base === undefined || !$("diff").checked) { target.textContent = text; return; }
  const own = words(text), kept = common(words(base), own);
  let run = "", marked = false;
  const flush = () => {
    if (run) target.append(marked ? make("mark", run) : run);
    run = "";
  };
  own.forEach((word, i) => {
    const differs = !kept[i];
    if (differs !== marked) { flush(); marked = differs; }
    run += word;
  });
  flush();
}

function fill(box, row) {
  box.replaceChildren();
  const list = replies(row);
  box.style.gridTemplateColumns = `repeat(${Math.max(1, new Set(list.map((it) => it.r)).size)}, minmax(13rem, 1fr))`;
  const columns = [...new Set(list.map((it) => it.r))];
  const bases = new Map(), names = shortNames();
  for (const it of list) {
    const key = `${it.setting}/${it.o}`;
    if (!bases.has(key)) bases.set(key, it);
    const base = bases.get(key);
    const cell = make("article", undefined, "reply");
    cell.style.setProperty("--hue", hue(it.r));
    cell.style.gridColumn = columns.indexOf(it.r) + 1;
    cell.style.gridRow = [...bases.keys()].indexOf(key) + 1;
    const head = make("div");
    head.append(make("strong", names[it.r]));
    head.title = reports[it.r].model_name;
    cell.append(head);
    let facts = `${it.setting} ${it.o + 1} · ${it.text.length} characters`;
    if (it.stat) facts += ` · ${it.stat.tokens} tokens · ${(it.stat.tokens / it.stat.seconds).toFixed(1)} tokens/s`;
    if (it.stat?.finish === "length") facts += " · cut";
    if (base !== it && base.text === it.text) facts += " · the same";
    cell.append(make("small", facts));
    if ($("params").checked) cell.append(make("small", JSON.stringify(it.params), "params"));
    const text = make("p");
    write(text, it.text, base === it ? undefined : base.text);
    cell.append(text);
    box.append(cell);
  }
}

function toggle(item, row, open) {
  const button = item.firstChild;
  button.setAttribute("aria-expanded", open);
  item.querySelector(".replies")?.remove();
  if (!open) { opened.delete(row.prompt); return; }
  opened.add(row.prompt);
  const box = make("div", undefined, "replies");
  item.append(box);
  fill(box, row);
}

const items = new Map();
// Replies are drawn when they come near the screen, so that hundreds can be open.
const seen = new IntersectionObserver((entries) => {
  for (const it of entries) {
    if (!it.isIntersecting) continue;
    seen.unobserve(it.target);
    const row = items.get(it.target);
    if (opened.has(row.prompt) && !it.target.querySelector(".replies")) toggle(it.target, row, true);
  }
}, { rootMargin: "600px" });

function draw() {
  const query = $("search").value.trim().toLowerCase();
  const only = $("differing").checked;
  const list = $("prompts");
  seen.disconnect();
  items.clear();
  const drawn = document.createDocumentFragment();
  let count = 0;
  for (const row of rows) {
    const texts = query || only ? replies(row) : [];
    if (query && !row.prompt.toLowerCase().includes(query)
      && !texts.some((it) => it.text.toLowerCase().includes(query))) continue;
    if (only) {
      const first = new Map();
      let differs = false;
      for (const it of texts) {
        const key = `${it.setting}/${it.o}`;
        if (!first.has(key)) first.set(key, it.text);
        else differs ||= first.get(key) !== it.text;
      }
      if (!differs) continue;
    }
    count++;
    const item = make("div", undefined, "prompt");
    const button = make("button", row.prompt);
    button.type = "button";
    button.setAttribute("aria-expanded", opened.has(row.prompt));
    button.onclick = () => toggle(item, row, !item.querySelector(".replies"));
    item.append(button);
    items.set(item, row);
    if (opened.has(row.prompt)) seen.observe(item);
    drawn.append(item);
  }
  list.replaceChildren(drawn);
  $("count").textContent = `${count} of ${rows.length} prompts`;
}

function summary() {
  const table = make("table");
  const head = make("tr");
  for (const it of ["Model", "Setting", "Replies", "Mean characters", "Mean tokens", "Tokens/s", "Cut", "As the first model"])
    head.append(make("th", it));
  table.append(head);
  const base = new Map();
  reports.forEach((report, r) => {
    const sums = new Map();
    report.prompts.forEach((entry, p) => entry.results.forEach((result, s) => result.outputs.forEach((raw, o) => {
      const text = clean(raw), key = result.sampling_config;
      if (!sums.has(key)) sums.set(key, { n: 0, chars: 0, tokens: 0, seconds: 0, timed: 0, cut: 0, same: 0 });
      const sum = sums.get(key), stat = report.stats?.[p]?.[s]?.[o];
      sum.n++;
      sum.chars += text.length;
      if (stat) { sum.timed++; sum.tokens += stat.tokens; sum.seconds += stat.seconds; sum.cut += stat.finish === "length"; }
      const place = `${entry.prompt}\u0000${key}\u0000${o}`;
      if (r === 0) base.set(place, text);
      else sum.same += base.get(place) === text;
    })));
    for (const [setting, it] of sums) {
      const line = make("tr");
      const cells = [report.model_name, setting, it.n, Math.round(it.chars / it.n),
        it.timed ? Math.round(it.tokens / it.timed) : "-", it.timed ? (it.tokens / it.seconds).toFixed(1) : "-",
        it.timed ? `${Math.round(100 * it.cut / it.timed)} %` : "-", r ? `${Math.round(100 * it.same / it.n)} %` : "-"];
      for (const cell of cells) line.append(make("td", String(cell)));
      table.append(line);
    }
  });
  $("summary").replaceChildren(table);
}

function options() {
  const setting = $("setting").value, output = $("output").value;
  $("setting").replaceChildren(new Option("every setting", ""), ...settings().map((it) => new Option(it, it)));
  let most = 1;
  for (const report of reports)
    for (const entry of report.prompts) for (const it of entry.results) most = Math.max(most, it.outputs.length);
  $("output").replaceChildren(new Option("every reply", ""),
    ...Array.from({ length: most }, (_, i) => new Option(`reply ${i + 1}`, i)));
  $("setting").value = setting;
  $("output").value = output;
}

function all() { rows = join(); options(); summary(); draw(); }

let timer;
$("search").oninput = () => { clearTimeout(timer); timer = setTimeout(draw, 120); };
for (const id of ["setting", "output", "diff", "params", "differing"]) $(id).onchange = draw;
$("expand").onclick = () => { for (const row of rows) opened.add(row.prompt); draw(); };
$("collapse").onclick = () => { opened.clear(); draw(); };
$("more").onchange = async (event) => {
  for (const file of event.target.files) {
    try {
      const report = JSON.parse(await file.text());
      if (!Array.isArray(report.prompts) || !report.model_name) throw new Error("no prompts");
      reports.push(report);
    } catch (error) { alert(`${file.name} is no sampling report (${error.message})`); }
  }
  event.target.value = "";
  all();
};
all();
